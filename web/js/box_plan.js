// Key-framed boxes as the node's text holds them: reading, writing, and the box of a frame (story/box_text.py, story/boxes.py).

const SNAP = 0.02;          // frames, as in story/boxes.py
const LARGEST_PART = 2;     // larger numbers are pixels

export const round4 = (value) => Math.round(value * 1e4) / 1e4;

/** A plan {objects: [{id, words, keys: [{t, box}]}], background, canvas, fps} with boxes in parts of the picture; throws. */
export function parse(text, frames, canvas) {
  const plan = text.trim().startsWith("{") ? fromJson(JSON.parse(text), frames) : fromLines(text, frames);
  const boxes = plan.objects.flatMap((object) => object.keys.map((key) => key.box).filter(Boolean));
  if (boxes.some((box) => !Array.isArray(box) || box.length !== 4 || box.some((value) => !Number.isFinite(value)))) throw new Error("box");
  if (boxes.flat().some((value) => Math.abs(value) > LARGEST_PART)) {
    const [width, height] = plan.canvas || canvas;
    for (const object of plan.objects)
      for (const key of object.keys)
        if (key.box) key.box = key.box.map((value, side) => round4(value / (side % 2 ? height : width)));
  }
  for (const object of plan.objects) object.keys.sort((a, b) => a.t - b.t);
  return plan;
}

function fromJson(data, frames) {
  const objects = data.objects.map((object) => ({
    id: String(object.id ?? object.words ?? ""),
    words: object.words ?? "",
    keys: object.keyframes.map((key) => ({ t: key.t ?? timeOf(key.frame, frames), box: key.box })),
  }));
  return { objects, background: data.background ?? "", canvas: data.canvas, fps: data.fps };
}

function fromLines(text, frames) {
  const plan = { objects: [], background: "" };
  for (const line of text.split(/\r?\n/).map((part) => part.trim())) {
    if (!line || line.startsWith("//")) continue;
    const [head, ...keys] = line.split("|");
    const setting = line.match(/^(background|canvas)\s*:\s*(.+)$/i);
    if (!keys.length && setting) {
      const name = setting[1].toLowerCase();
      plan[name] = name === "canvas" ? numbers(setting[2]) : setting[2];
      continue;
    }
    if (!keys.length) throw new Error("line");
    const [name, ...words] = head.split("=").map((part) => part.trim());
    const phrase = words.length ? words.join("=") : name;
    plan.objects.push({ id: freeName(words.length ? name : phrase, plan.objects), words: phrase, keys: keys.map((key) => typedKey(key, frames)) });
  }
  return plan;
}

function typedKey(text, frames) {
  const [time, corners] = text.split(":").map((part) => part.trim());
  const frame = time.match(/^f\s*(\d+)$/i);
  const t = frame ? timeOf(Number(frame[1]), frames) : Number(time);
  if (corners === undefined || !Number.isFinite(t)) throw new Error("time");
  return { t, box: corners === "-" ? null : numbers(corners) };
}

const numbers = (text) => text.replace(/[[\](),;]/g, " ").trim().split(/\s+/).map(Number);

export function freeName(name, objects) {
  let free = name;
  for (let number = 2; objects.some((object) => object.id === free); number++) free = `${name} ${number}`;
  return free;
}

/** The JSON form, one object a line. */
export function write(plan) {
  const lines = plan.objects.map((object) => JSON.stringify({
    id: object.id, words: object.words, keyframes: object.keys.map((key) => ({ t: round4(key.t), box: key.box })),
  }));
  const fields = [];
  if (plan.canvas) fields.push(`"canvas": ${JSON.stringify(plan.canvas)}`);
  if (plan.fps) fields.push(`"fps": ${plan.fps}`);
  fields.push(`"objects": [\n  ${lines.join(",\n  ")}\n ]`);
  if (plan.background) fields.push(`"background": ${JSON.stringify(plan.background)}`);
  return plan.objects.length ? `{${fields.join(",\n ")}}` : "";
}

export const timeOf = (frame, frames) => (frames > 1 ? frame / (frames - 1) : 0);

export function placeOf(key, frames) {
  const place = key.t * Math.max(frames - 1, 1);
  return Math.abs(place - Math.round(place)) < SNAP ? Math.round(place) : place;
}

export const keyAt = (object, frame, frames) => object.keys.find((key) => placeOf(key, frames) === frame);

export function setKey(object, frame, frames, box) {
  const key = keyAt(object, frame, frames);
  if (key) key.box = box;
  else object.keys.push({ t: round4(timeOf(frame, frames)), box });
  object.keys.sort((a, b) => a.t - b.t);
}

/** Corners in a frame, null where the object is absent. */
export function boxAt(object, frame, frames, smooth) {
  const keys = object.keys.map((key) => [placeOf(key, frames), key.box]);
  if (!keys.length) return null;
  let at = keys.length - 1;
  while (at > 0 && keys[at][0] > frame) at--;
  if (!keys[at][1]) return null;
  let first = at, last = at;
  while (first > 0 && keys[first - 1][1]) first--;
  while (last < keys.length - 1 && keys[last + 1][1]) last++;
  const span = keys.slice(first, last + 1);
  at -= first;
  if (frame <= span[at][0] || at === span.length - 1) return span[at][1];
  const share = (frame - span[at][0]) / (span[at + 1][0] - span[at][0]);
  if (!smooth) return span[at][1].map((value, side) => value + (span[at + 1][1][side] - value) * share);
  const places = span.map((key) => key[0]);
  const forms = span.map(([, [x0, y0, x1, y1]]) => [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]);
  const [x, y, width, height] = [0, 1, 2, 3].map((side) => cubic(places, forms.map((form) => form[side]), at, share));
  return [x - width / 2, y - height / 2, x + width / 2, y + height / 2];
}

function cubic(places, values, at, u) {
  const width = places[at + 1] - places[at], rise = values[at + 1] - values[at];
  const first = slope(places, values, at) * width, second = slope(places, values, at + 1) * width;
  return values[at] + u * (first + u * (3 * rise - 2 * first - second + u * (first + second - 2 * rise)));
}

function slope(places, values, at) {
  const sides = [at, at + 1].filter((end) => end > 0 && end < values.length)
    .map((end) => [values[end] - values[end - 1], places[end] - places[end - 1]]);
  if (sides.length === 1) return sides[0][0] / sides[0][1];
  const [[rise, width], [nextRise, nextWidth]] = sides;
  if (rise * nextRise <= 0) return 0;
  const weight = 2 * nextWidth + width, nextWeight = nextWidth + 2 * width;
  return (weight + nextWeight) / (weight * width / rise + nextWeight * nextWidth / nextRise);
}
