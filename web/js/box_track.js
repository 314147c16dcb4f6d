// Editor of the Box Track node: boxes over a picture, key frames on a timeline. Its value is the node's text widget.

import { app } from "../../../scripts/app.js";
import { boxAt, freeName, keyAt, parse, placeOf, round4, setKey, timeOf, write } from "./box_plan.js";

const COLOURS = ["#ff5a5f", "#2fa4ff", "#ffc53d", "#35c46a", "#b678ff", "#ff8a34", "#20c7c0", "#f26fb2"]; // as in host/boxes.py
const ROW = 16, HANDLE = 6, LEAST = 0.01;
const STYLE = {
  root: "display:flex;flex-direction:column;min-height:300px;gap:4px;width:100%;height:100%;box-sizing:border-box;padding:4px;outline-offset:-2px;"
    + "font:12px sans-serif;color:#ddd;background:#1e1e24;border-radius:6px;overflow:hidden;user-select:none",
  picture: "flex:1 1 0;min-height:60px;width:100%;cursor:crosshair;touch-action:none;display:block",
  line: "flex:none;width:100%;cursor:pointer;touch-action:none;display:block",
  bar: "flex:none;display:flex;gap:4px;align-items:center",
  button: "flex:none;padding:2px 7px;border:0;border-radius:4px;background:#3a3a44;color:#ddd;font:12px sans-serif;cursor:pointer",
  words: "flex:1 1 0;min-width:40px;padding:2px 6px;border:0;border-radius:4px;background:#2b2b33;color:#eee;font:12px sans-serif",
};
const TEXTS = {
  en: {
    words: "words of the object in the prompt", key: "Key", keyTip: "Set or remove a key frame here", away: "Absent",
    awayTip: "Absent from this frame on / there again", remove: "Delete", removeTip: "Delete the object (Delete removes the key frame here first)",
    play: "Play or stop", linked: "Run to see the connected boxes", draw: "Draw a box with the mouse", other: "The editor cannot draw this text; the node reads it when it runs.",
  },
  ko: {
    words: "프롬프트에 있는 대상의 낱말", key: "키", keyTip: "이 프레임에 키 추가/제거", away: "없음",
    awayTip: "이 프레임부터 없음 / 다시 나타남", remove: "삭제", removeTip: "대상 삭제 (Delete 키는 이 프레임의 키를 먼저 지움)",
    play: "재생 또는 정지", linked: "실행하면 연결된 상자가 보입니다", draw: "마우스로 상자를 그리세요", other: "편집기가 그릴 수 없는 글입니다. 실행하면 노드가 읽습니다.",
  },
};

function element(kind, style, properties = {}) {
  const made = Object.assign(document.createElement(kind), properties);
  made.style.cssText = STYLE[style];
  return made;
}

class BoxEditor {
  constructor(node) {
    this.node = node;
    this.frame = 0;
    this.selected = 0;
    this.pictures = [];
    this.texts = TEXTS[app.extensionManager?.setting?.get("Comfy.Locale")] ?? TEXTS.en;
    this.root = element("div", "root", { tabIndex: 0, className: "storyweft-boxes" });
    this.picture = element("canvas", "picture");
    this.line = element("canvas", "line");
    this.words = element("input", "words", { type: "text", placeholder: this.texts.words });
    const bar = element("div", "bar");
    this.keyButton = this.button(this.texts.key, this.texts.keyTip, () => this.toggleKey());
    this.awayButton = this.button(this.texts.away, this.texts.awayTip, () => this.toggleAway());
    this.count = document.createElement("span");
    bar.append(this.button("▶", this.texts.play, () => this.play()), this.count, this.words, this.keyButton, this.awayButton,
      this.button(this.texts.remove, this.texts.removeTip, () => this.removeObject()));
    this.root.append(this.picture, this.line, bar);
    this.listen();
    this.read();
  }

  button(text, title, action) {
    const made = element("button", "button", { type: "button", textContent: text, title });
    made.addEventListener("click", action);
    return made;
  }

  listen() {
    this.root.addEventListener("pointerdown", (event) => event.stopPropagation()); // else the node would be dragged
    this.root.addEventListener("pointerenter", () => this.findPicture());
    this.root.addEventListener("keydown", (event) => this.keyPressed(event));
    this.words.addEventListener("change", () => this.rename());
    this.picture.addEventListener("pointerdown", (event) => this.startDrag(event, this.picture, this.grab(event)));
    this.line.addEventListener("pointerdown", (event) => this.startDrag(event, this.line, this.grabTime(event)));
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  // --- the node's other widgets ----------------------------------------------------------------------------------------

  value(name) { return this.node.widgets.find((widget) => widget.name === name)?.value; }

  get frames() { return this.value("frames") || this.last?.frames || 16; }

  get smooth() { return this.value("interpolation") === "smooth"; }

  get size() {
    const image = this.image;
    return image ? [image.naturalWidth, image.naturalHeight] : [this.value("width") || 512, this.value("height") || 512];
  }

  get image() {
    const place = this.pictures.length > 1 ? Math.round(this.frame / Math.max(this.frames - 1, 1) * (this.pictures.length - 1)) : 0;
    const image = this.pictures[place];
    return image?.naturalWidth ? image : null;
  }

  /** Whether the text comes from another node: then the boxes of the last run are shown, and not changed. */
  get linked() { return this.node.inputs?.some((input) => input.name === "boxes" && input.link != null); }

  get object() { return this.linked ? undefined : this.plan?.objects[this.selected]; }

  read() {
    if (this.saving) return;
    try {
      this.plan = parse((this.linked ? this.last?.text : this.value("boxes")) ?? "", this.frames, [this.value("width") || 512, this.value("height") || 512]);
    } catch { // the node says what is wrong with a text when it runs
      this.plan = null;
    }
    this.draw();
  }

  save() {
    const widget = this.node.widgets.find((one) => one.name === "boxes");
    this.saving = true; // the text says what the plan says already
    widget.value = write(this.plan);
    widget.callback?.(widget.value);
    this.saving = false;
    this.node.setDirtyCanvas?.(true, true);
    this.draw();
  }

  /** The picture behind the boxes: those of the last run, else what the connected node shows. */
  findPicture() {
    const slot = this.node.inputs?.find((input) => input.name === "images");
    const link = slot?.link != null ? this.node.graph?.getLink?.(slot.link) ?? this.node.graph?.links?.[slot.link] : null;
    const source = link && this.node.graph.getNodeById(link.origin_id);
    if (!source) this.last &&= { ...this.last, pictures: [] };
    const files = !source ? [] : this.last?.pictures?.length ? this.last.pictures : app.nodeOutputs?.[source.id]?.images ?? [];
    const urls = files.map((file) => app.api.apiURL(`/view?${new URLSearchParams({
      filename: file.filename, subfolder: file.subfolder ?? "", type: file.type ?? "temp" })}`));
    if (!urls.length && source?.imgs?.length) urls.push(...source.imgs.map((image) => image.src));
    if (urls.join() === this.urls) return;
    this.urls = urls.join();
    this.pictures = urls.map((url) => Object.assign(new Image(), { onload: () => this.draw(), src: url }));
    this.draw();
  }

  ran(output) {
    const [shown] = output?.storyweft_boxes ?? [];
    if (!shown) return;
    this.last = shown;
    this.findPicture();
    this.read();
  }

  // --- mouse -----------------------------------------------------------------------------------------------------------

  startDrag(event, target, move) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.root.focus({ preventScroll: true });
    if (!move) return;
    target.setPointerCapture(event.pointerId);
    const end = () => {
      target.removeEventListener("pointermove", move);
      target.removeEventListener("pointerup", end);
      target.removeEventListener("pointercancel", end);
      if (this.changed) this.save();
      this.changed = false;
    };
    target.addEventListener("pointermove", move);
    target.addEventListener("pointerup", end);
    target.addEventListener("pointercancel", end);
  }

  /** Where the pointer is, in parts of the shown picture. */
  point(event) {
    const view = this.view(), frame = this.picture.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width * this.picture.clientWidth;
    const y = (event.clientY - frame.top) / frame.height * this.picture.clientHeight;
    return [(x - view.x) / view.w, (y - view.y) / view.h];
  }

  view() {
    const [width, height] = this.size, room = [this.picture.clientWidth, this.picture.clientHeight];
    const scale = Math.min(room[0] / width, room[1] / height);
    return { x: (room[0] - width * scale) / 2, y: (room[1] - height * scale) / 2, w: width * scale, h: height * scale };
  }

  /** What a press on the picture starts: resizing, moving, or drawing a box. */
  grab(event) {
    if (!this.plan || this.linked) return null;
    this.stop();
    const [x, y] = this.point(event), view = this.view();
    const near = (a, b, length) => Math.abs(a - b) * length <= HANDLE + 2;
    const box = this.object && this.here(this.object);
    if (box) {
      const side = (low, high, at, length) => (near(at, high, length) ? 2 : near(at, low, length) ? 0 : null);
      const [horizontal, vertical] = [side(box[0], box[2], x, view.w), side(box[1], box[3], y, view.h)];
      if (horizontal !== null && vertical !== null) return this.resizing(this.object, [horizontal, vertical + 1]);
    }
    const inside = (corners) => corners && x >= corners[0] && x <= corners[2] && y >= corners[1] && y <= corners[3];
    const order = this.plan.objects.map((_, number) => number).reverse();
    const hit = inside(box) ? this.selected : order.find((number) => inside(this.here(this.plan.objects[number])));
    if (hit === undefined) return this.drawing([x, y]);
    this.select(hit);
    return this.moving(this.object, [x, y]);
  }

  here(object) { return boxAt(object, this.frame, this.frames, this.smooth); }

  put(object, box) {
    setKey(object, this.frame, this.frames, box.map(round4));
    this.changed = true;
    this.draw();
  }

  resizing(object, [horizontal, vertical]) {
    const box = [...this.here(object)];
    return (event) => {
      const at = this.point(event).map((value) => Math.min(Math.max(value, 0), 1));
      box[horizontal] = horizontal ? Math.max(at[0], box[0] + LEAST) : Math.min(at[0], box[2] - LEAST);
      box[vertical] = vertical === 3 ? Math.max(at[1], box[1] + LEAST) : Math.min(at[1], box[3] - LEAST);
      this.put(object, box);
    };
  }

  moving(object, start) {
    const box = this.here(object);
    return (event) => {
      const at = this.point(event);
      this.put(object, shifted(box, at[0] - start[0], at[1] - start[1]));
    };
  }

  /** A new object, or the box of the selected one where it is absent. */
  drawing(start) {
    const from = start.map((value) => Math.min(Math.max(value, 0), 1));
    let object = this.object && !this.here(this.object) ? this.object : null;
    return (event) => {
      const at = this.point(event).map((value) => Math.min(Math.max(value, 0), 1));
      const box = [0, 1, 0, 1].map((side, corner) => (corner < 2 ? Math.min : Math.max)(from[side], at[side]));
      if (box[2] - box[0] < LEAST || box[3] - box[1] < LEAST) return;
      if (!object) {
        const id = freeName(`object ${this.plan.objects.length + 1}`, this.plan.objects);
        object = { id, words: "", keys: [] };
        this.plan.objects.push(object);
        this.select(this.plan.objects.length - 1);
      }
      this.put(object, box);
    };
  }

  frameAt(event) {
    const frame = this.line.getBoundingClientRect();
    const share = ((event.clientX - frame.left) / frame.width * this.line.clientWidth - 8) / (this.line.clientWidth - 16);
    return Math.min(Math.max(Math.round(share * (this.frames - 1)), 0), this.frames - 1);
  }

  /** A press on the timeline: goes there; on a key frame, drags it. */
  grabTime(event) {
    if (!this.plan) return null;
    this.stop();
    const top = this.line.getBoundingClientRect();
    const row = Math.floor((event.clientY - top.top) / top.height * this.line.clientHeight / ROW);
    this.frame = this.frameAt(event);
    if (row < this.plan.objects.length) this.select(row);
    const object = this.linked ? undefined : this.plan.objects[row], key = object && keyAt(object, this.frame, this.frames);
    this.draw();
    return (moved) => {
      const to = this.frameAt(moved);
      if (to === this.frame) return;
      if (key && keyAt(object, to, this.frames)) return;
      if (key) {
        key.t = round4(timeOf(to, this.frames));
        object.keys.sort((a, b) => a.t - b.t);
        this.changed = true;
      }
      this.frame = to;
      this.draw();
    };
  }

  // --- buttons and keys ------------------------------------------------------------------------------------------------

  select(number) {
    this.selected = number;
    this.draw();
  }

  rename() {
    if (!this.object) return;
    const words = this.words.value.trim().replace(/\s+/g, " ");
    const others = this.plan.objects.filter((object) => object !== this.object);
    Object.assign(this.object, { words, id: words ? freeName(words, others) : this.object.id });
    this.save();
  }

  toggleKey() {
    const box = this.object && this.here(this.object);
    if (!this.object) return;
    if (keyAt(this.object, this.frame, this.frames)) this.removeKey();
    else if (box) setKey(this.object, this.frame, this.frames, box.map(round4));
    this.save();
  }

  removeKey() {
    const key = keyAt(this.object, this.frame, this.frames);
    if (this.object.keys.filter((one) => one !== key).some((one) => one.box)) this.object.keys = this.object.keys.filter((one) => one !== key);
  }

  toggleAway() {
    if (!this.object) return;
    const key = keyAt(this.object, this.frame, this.frames), box = this.here(this.object);
    if (key && !key.box) this.removeKey();
    else if (box) setKey(this.object, this.frame, this.frames, null);
    else setKey(this.object, this.frame, this.frames, [...this.object.keys].reverse().find((one) => one.box)?.box ?? [0.3, 0.3, 0.7, 0.7]);
    if (!this.object.keys.some((one) => one.box)) this.removeObject();
    else this.save();
  }

  removeObject() {
    if (!this.object) return;
    this.plan.objects.splice(this.selected, 1);
    this.selected = Math.max(0, this.selected - 1);
    this.save();
  }

  keyPressed(event) {
    if (event.target !== this.root || !this.plan || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = event.shiftKey ? 0.05 : 0.01;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    const box = this.object && this.here(this.object);
    if (moves[event.key] && box) setKey(this.object, this.frame, this.frames, shifted(box, ...moves[event.key]).map(round4));
    else if (["Delete", "Backspace"].includes(event.key) && this.object) {
      const before = this.object.keys.length;
      if (keyAt(this.object, this.frame, this.frames)) this.removeKey();
      if (this.object.keys.length === before) this.plan.objects.splice(this.selected, 1);
      this.selected = Math.min(this.selected, Math.max(this.plan.objects.length - 1, 0));
    } else if (event.key === "," || event.key === ".") {
      this.frame = Math.min(Math.max(this.frame + (event.key === "," ? -1 : 1), 0), this.frames - 1);
    } else return;
    event.preventDefault();
    event.stopPropagation(); // Delete would remove the node, arrows would move it
    if (event.key === "," || event.key === ".") this.draw();
    else this.save();
  }

  play() {
    if (this.timer) return this.stop();
    this.timer = setInterval(() => {
      if (!this.root.isConnected) return this.stop();
      this.frame = (this.frame + 1) % this.frames;
      this.draw();
    }, 100);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
  }

  // --- drawing ---------------------------------------------------------------------------------------------------------

  draw() {
    this.frame = Math.min(this.frame, this.frames - 1);
    this.count.textContent = `${this.frame + 1}/${this.frames}`;
    if (document.activeElement !== this.words) this.words.value = this.object?.words ?? "";
    this.words.disabled = !this.object;
    const key = this.object && keyAt(this.object, this.frame, this.frames);
    this.keyButton.style.background = key ? COLOURS[this.selected % COLOURS.length] : "#3a3a44";
    this.awayButton.style.background = this.object && !this.here(this.object) ? COLOURS[this.selected % COLOURS.length] : "#3a3a44";
    this.drawPicture();
    this.drawLine();
  }

  pen(canvas) {
    const ratio = Math.max(window.devicePixelRatio, 1) * 2; // sharp when the graph is zoomed in
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "11px sans-serif";
    return pen;
  }

  drawPicture() {
    const pen = this.pen(this.picture), view = this.view();
    pen.fillStyle = "#2b2b33";
    pen.fillRect(view.x, view.y, view.w, view.h);
    if (this.image) pen.drawImage(this.image, view.x, view.y, view.w, view.h);
    pen.fillStyle = "#aaa";
    pen.textAlign = "center";
    const hint = !this.plan ? this.texts.other : this.plan.objects.length ? "" : this.linked ? this.texts.linked : this.texts.draw;
    pen.fillText(hint, view.x + view.w / 2, view.y + view.h / 2, view.w - 8);
    pen.textAlign = "left";
    this.plan?.objects.forEach((object, number) => this.drawObject(pen, view, object, number));
  }

  drawObject(pen, view, object, number) {
    const chosen = number === this.selected;
    pen.strokeStyle = pen.fillStyle = COLOURS[number % COLOURS.length];
    pen.lineWidth = 1;
    pen.beginPath();
    for (let frame = 0; frame < this.frames; frame++) {
      const box = boxAt(object, frame, this.frames, this.smooth);
      if (box) pen.lineTo(view.x + (box[0] + box[2]) / 2 * view.w, view.y + (box[1] + box[3]) / 2 * view.h);
    }
    pen.stroke();
    const box = this.here(object);
    if (!box) return;
    const [left, top] = [view.x + box[0] * view.w, view.y + box[1] * view.h];
    const [width, height] = [(box[2] - box[0]) * view.w, (box[3] - box[1]) * view.h];
    pen.globalAlpha = chosen ? 0.18 : 0.08;
    pen.fillRect(left, top, width, height);
    pen.globalAlpha = 1;
    pen.lineWidth = chosen ? 2 : 1;
    pen.strokeRect(left, top, width, height);
    const label = object.words || object.id;
    pen.fillRect(left, top, pen.measureText(label).width + 8, 15);
    if (chosen)
      for (const [x, y] of [[0, 0], [1, 0], [0, 1], [1, 1]])
        pen.fillRect(left + x * width - HANDLE / 2, top + y * height - HANDLE / 2, HANDLE, HANDLE);
    pen.fillStyle = "#141218";
    pen.fillText(label, left + 4, top + 11);
  }

  drawLine() {
    const objects = this.plan?.objects ?? [];
    if (!this.changed) this.line.style.height = `${Math.max(objects.length, 3) * ROW}px`; // not in the middle of a drag
    const pen = this.pen(this.line), width = this.line.clientWidth - 16;
    const x = (place) => 8 + place / Math.max(this.frames - 1, 1) * width;
    objects.forEach((object, row) => {
      const middle = row * ROW + ROW / 2;
      if (row === this.selected) {
        pen.fillStyle = "#2f2f39";
        pen.fillRect(0, row * ROW, this.line.clientWidth, ROW);
      }
      pen.fillStyle = COLOURS[row % COLOURS.length];
      const half = width / Math.max(this.frames - 1, 1) / 2;
      for (let frame = 0; frame < this.frames; frame++)
        if (boxAt(object, frame, this.frames, this.smooth)) pen.fillRect(x(frame) - half, middle - 1.5, half * 2, 3);
      for (const key of object.keys) {
        const at = x(placeOf(key, this.frames));
        pen.beginPath();
        pen.moveTo(at, middle - 6);
        for (const [right, down] of [[6, 0], [0, 6], [-6, 0]]) pen.lineTo(at + right, middle + down);
        pen.closePath();
        pen.strokeStyle = pen.fillStyle;
        pen.lineWidth = 1.5;
        if (key.box) pen.fill();
        else pen.stroke();
      }
    });
    pen.fillStyle = "#fff";
    pen.fillRect(x(this.frame) - 0.75, 0, 1.5, this.line.clientHeight);
  }
}

/** A box moved, with a part of it left inside the picture. */
function shifted(box, right, down) {
  const keep = (low, high, by) => Math.min(Math.max(by, 0.02 - high), 0.98 - low);
  const [dx, dy] = [keep(box[0], box[2], right), keep(box[1], box[3], down)];
  return [box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy];
}

/** Calls `after` behind an instance's own handler. */
function follow(owner, name, after) {
  const before = owner[name];
  owner[name] = function (...given) {
    const result = before?.apply(this, given);
    after(...given);
    return result;
  };
}

app.registerExtension({
  name: "Storyweft.BoxTrack",
  nodeCreated(node) {
    if (node.comfyClass !== "StoryweftBoxTrack") return;
    const editor = new BoxEditor(node);
    const widget = node.addDOMWidget("box_editor", "storyweft_boxes", editor.root, {
      serialize: false, hideOnZoom: false, getMinHeight: () => 340,
    });
    widget.serialize = false; // the text widget holds the value
    for (const name of ["boxes", "frames", "width", "height", "interpolation"])
      follow(node.widgets.find((one) => one.name === name), "callback", () => editor.read());
    follow(node, "onConfigure", () => editor.read());
    follow(node, "onConnectionsChange", () => { editor.findPicture(); editor.read(); });
    follow(node, "onExecuted", (output) => editor.ran(output));
    follow(node, "onRemoved", () => editor.stop());
    node.setSize([Math.max(node.size[0], 460), Math.max(node.size[1], 720)]);
  },
});
