"""Queues workflows/api/consistent_story.json on a real server through its HTTP API and fetches the pictures."""

import asyncio
import json
import sys
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import aiohttp  # noqa: E402
from environment import ROOT, Trouble, one_sentence, say  # noqa: E402
from serve import free_port, running  # noqa: E402

WORKFLOW = ROOT / "workflows" / "api" / "consistent_story.json"
OUTPUT = ROOT / "output"


def bar(done: float, total: float) -> str:
    filled = round(30 * done / max(total, 1))
    return f"\r  [{'#' * filled}{'.' * (30 - filled)}] {int(done)}/{int(total)} "


async def draw(url: str, graph: dict) -> dict:
    """Queue a graph, show its progress, return its outputs by node."""
    client = uuid.uuid4().hex
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{url}/ws?clientId={client}", max_msg_size=0) as socket,
    ):
        async with session.post(f"{url}/prompt", json={"prompt": graph, "client_id": client}) as answer:
            queued = await answer.json()
        if "prompt_id" not in queued:
            raise Trouble(f"the server refused the workflow: {queued.get('error', queued)}")
        async for message in socket:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            data = event.get("data", {})
            if event["type"] == "executing" and data["node"] is None:  # after execution_success the history is written
                break
            if event["type"] == "executing":
                print(f"\n  {graph[data['node']]['_meta']['title']}", end="", flush=True)
            elif event["type"] == "progress":
                print(bar(data["value"], data["max"]), end="", flush=True)
            elif event["type"] == "execution_error":
                print()
                raise Trouble(f"{data['node_type']} failed: {data['exception_message'].strip()}")
        else:
            print()
            raise Trouble(f"ComfyUI stopped while it was drawing (log: {OUTPUT / 'comfyui' / 'server.log'}).")
        print()
        async with session.get(f"{url}/history/{queued['prompt_id']}") as answer:
            return (await answer.json())[queued["prompt_id"]]["outputs"]


def fetch(url: str, outputs: dict) -> list[Path]:
    """Copy every picture that was saved into output/."""
    files = []
    for node in outputs.values():
        for image in node.get("images", []):
            if image["type"] == "output":
                target = OUTPUT / image["filename"]
                with urllib.request.urlopen(f"{url}/view?{urllib.parse.urlencode(image)}", timeout=60) as answer:
                    target.write_bytes(answer.read())
                files.append(target)
    return files


def main() -> None:
    OUTPUT.mkdir(exist_ok=True)
    graph = json.loads(WORKFLOW.read_text())
    say("starting ComfyUI")
    with running(free_port(), OUTPUT / "comfyui") as (url, _):
        say(f"queueing {WORKFLOW.relative_to(ROOT)} through the HTTP API")
        files = fetch(url, asyncio.run(draw(url, graph)))
    for path in files:
        say(f"wrote {path.relative_to(ROOT)}")
    say("next: `make serve` opens the page, `make test` proves the pack right")


if __name__ == "__main__":
    with one_sentence():
        main()
