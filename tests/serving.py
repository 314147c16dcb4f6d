"""One real ComfyUI server for a test session, with helpers to queue graphs and follow them."""
import asyncio
import json
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import serve as tools_server  # noqa: E402

# those that open with the demo models; in this order, in which saved_character reads a file that long_story saves
RUNNABLE = sorted(path.stem for path in (ROOT / "workflows" / "api").glob("*.json") if '"StoryweftDemo' in path.read_text())


@contextmanager
def comfyui(base: Path):
    """A server with its files under `base`; yields a Server. The end of its log is printed when it stops."""
    with tools_server.running(tools_server.free_port(), base) as (url, _):
        yield Server(url, base)
    print((base / "server.log").read_text(errors="replace")[-3000:])


class Server:
    def __init__(self, url: str, base: Path):
        self.url = url
        self.base = base

    def get(self, path: str) -> dict:
        return tools_server.request(f"{self.url}{path}")

    def run(self, graph: dict, stop_after: int | None = None) -> "Followed":
        """Queue a graph and follow it to its end; with `stop_after`, interrupt at that progress value of a sampler."""
        return asyncio.run(asyncio.wait_for(self._run(graph, stop_after), 1200))

    def prepare(self, name: str) -> None:
        """Workflow saved_character reads what long_story saves."""
        if name == "saved_character" and not (self.base / "models" / "storyweft_characters" / "demo_Fox.safetensors").exists():
            self.run(api("long_story"))

    async def _run(self, graph: dict, stop_after: int | None) -> "Followed":
        client, seen = uuid.uuid4().hex, Followed()
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket,
        ):
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            async with session.post(f"{self.url}/prompt", json={"prompt": graph, "client_id": client}) as answer:
                seen.status, seen.answer = answer.status, await answer.json()
            if seen.status != 200:
                return seen
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    seen.previews += 1
                    continue
                event = json.loads(message.data)
                data = event.get("data", {})
                seen.events.append((event["type"], data))
                if event["type"] == "progress" and stop_after is not None and data["max"] >= 20 and data["value"] >= stop_after:
                    await session.post(f"{self.url}/interrupt", json={})
                    stop_after = None
                if event["type"] == "executing" and data["node"] is None:
                    break
            async with session.get(f"{self.url}/history/{seen.answer['prompt_id']}") as answer:
                seen.history = (await answer.json())[seen.answer["prompt_id"]]
        return seen


class Followed:
    """What came back of one queued graph."""

    def __init__(self):
        self.status, self.answer, self.history = 0, {}, {}
        self.events: list = []
        self.previews = 0

    def of(self, kind: str) -> list[dict]:
        return [data for name, data in self.events if name == kind]

    @property
    def images(self) -> list[dict]:
        return [image for node in self.history["outputs"].values() for image in node.get("images", [])]

    @property
    def error(self) -> str:
        failed = self.of("execution_error")
        assert failed, f"nothing was refused: {self.answer} {self.events[-3:]}"
        return failed[0]["exception_message"].strip()


def api(name: str) -> dict:
    return json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())


def node_of(graph: dict, kind: str) -> str:
    return next(number for number, node in graph.items() if node["class_type"] == kind)


def change(graph: dict, kind: str, **inputs) -> dict:
    """A copy of a graph with inputs of its first node of a kind changed."""
    graph = json.loads(json.dumps(graph))
    graph[node_of(graph, kind)]["inputs"] |= inputs
    return graph
