"""OpenAI's packages for Node.js: every endpoint, and a session of a realtime agent."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kimia_infer.audio.files import load_audio, pcm16
from tests.documentation import blocks
from tests.serving.helpers import Server
from tests.serving.openai.examples import PAGE, printed_by
from tests.serving.questions import QUESTION


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory, long: bool) -> Path:
    """A folder with OpenAI's packages for Node.js."""
    if not long:
        pytest.skip("installs packages; runs with --long")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("node")
    install = ["npm", "install", "--no-audit", "--no-fund", "openai", "@openai/agents"]
    subprocess.run(install, cwd=folder, check=True, capture_output=True, timeout=300)
    return folder


NODE = ["node", "--input-type=module", "-"]


def test_the_javascript_example(front: Server, node_folder: Path, tmp_path: Path) -> None:
    [block] = blocks(PAGE, "js")
    (tmp_path / "node_modules").symlink_to(node_folder / "node_modules")
    assert printed_by(NODE, block.text, front, tmp_path).strip() == block.output.strip()


EVERYTHING = """
import assert from "node:assert/strict";
import fs from "node:fs";
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ baseURL: "http://127.0.0.1:8000/v1", apiKey: "unused" });
const model = "kimi-audio";
const data = fs.readFileSync("scripts/question.wav").toString("base64");
const messages = [
  { role: "user", content: [{ type: "input_audio", input_audio: { data, format: "wav" } }] },
];
const speech = { modalities: ["text", "audio"], audio: { voice: "alloy", format: "wav" } };
const file = () => fs.createReadStream("scripts/question.wav");
const words = "what is four plus five";

assert.equal((await client.models.list()).data[0].id, model);

const text = await client.chat.completions.create({ model, messages });
assert.equal(text.choices[0].message.content, "nine");

const answer = await client.chat.completions.create({ model, messages, ...speech });
const { message } = answer.choices[0];
assert.equal(message.audio.transcript, "nine");
assert.equal(Buffer.from(message.audio.data, "base64").subarray(0, 4).toString(), "RIFF");

const more = [...messages, { role: "assistant", audio: { id: message.audio.id } }, ...messages];
const again = await client.chat.completions.create({ model, messages: more });
assert.equal(again.choices[0].message.content, "nine");

const pieces = client.chat.completions.stream({ model, messages });
let joined = "";
pieces.on("content", (piece) => (joined += piece));
assert.equal((await pieces.finalChatCompletion()).choices[0].message.content, "nine");
assert.equal(joined, "nine");

let said = "", bytes = 0;
const spoken = { ...speech, audio: { voice: "alloy", format: "pcm16" }, stream: true };
for await (const chunk of await client.chat.completions.create({ model, messages, ...spoken })) {
  said += chunk.choices[0].delta.audio?.transcript ?? "";
  bytes += Buffer.from(chunk.choices[0].delta.audio?.data ?? "", "base64").length;
}
assert.equal(said, "nine");
assert.ok(bytes > 20_000);

const transcribe = client.audio.transcriptions.create.bind(client.audio.transcriptions);
assert.equal((await transcribe({ model, file: file() })).text, words);
const srt = await transcribe({ model, file: file(), response_format: "srt" });
assert.ok(srt.includes(words) && srt.startsWith("1\\n00:00:00,"));
let heard = "";
for await (const event of await transcribe({ model, file: file(), stream: true }))
  if (event.type === "transcript.text.delta") heard += event.delta;
assert.equal(heard, words);
const english = await client.audio.translations.create({ model, file: file() });
assert.equal(typeof english.text, "string");

const sound = await client.audio.speech.create({
  model, voice: "alloy", input: "take the red ball to the school", response_format: "wav",
});
const read = await toFile(Buffer.from(await sound.arrayBuffer()), "speech.wav");
assert.equal((await transcribe({ model, file: read })).text, "take the red ball to the school");

await assert.rejects(
  client.chat.completions.create({ model, messages, top_p: 0.5 }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "top_p",
);
await assert.rejects(client.models.retrieve("other"), OpenAI.NotFoundError);
console.log("done");
"""


def test_every_endpoint_from_javascript(front: Server, node_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(node_folder / "node_modules")
    assert printed_by(NODE, EVERYTHING, front, tmp_path) == "done\n"


AGENT = """
import assert from "node:assert/strict";
import fs from "node:fs";
import { OpenAIRealtimeWebSocket, RealtimeAgent, RealtimeSession } from "@openai/agents/realtime";

const url = "ws://127.0.0.1:8000/v1/realtime?model=kimi-audio";
const transport = new OpenAIRealtimeWebSocket({ url, useInsecureApiKey: true });
const session = new RealtimeSession(new RealtimeAgent({ name: "guide", instructions: "" }), {
  transport,
  model: "kimi-audio",
  tracingDisabled: true,
});
let bytes = 0;
session.on("audio", (sound) => (bytes += sound.data.byteLength));
const answered = new Promise((resolve, reject) => {
  session.on("error", reject);
  session.on("history_updated", (history) => {
    const last = history.at(-1);
    if (last?.role === "assistant" && last.status === "completed") resolve(history);
  });
});
await session.connect({ apiKey: "unused", url });
const silence = Buffer.alloc(48_000);
const question = fs.readFileSync("question.pcm");
const sound = Buffer.concat([silence, question, silence, silence]);
for (let place = 0; place < sound.length; place += 4800)
  session.sendAudio(new Uint8Array(sound.subarray(place, place + 4800)).buffer);
const history = await answered;
const words = history.map((message) => [message.role, message.content[0].transcript]);
assert.deepEqual(words, [["user", "what is four plus five"], ["assistant", "nine"]]);
assert.ok(bytes > 20_000);
console.log("done");
process.exit(0);
"""


def test_an_agent_hears_and_is_heard(front: Server, node_folder: Path, tmp_path: Path) -> None:
    """By voice activity: nobody tells the server when the question ends."""
    (tmp_path / "node_modules").symlink_to(node_folder / "node_modules")
    samples = pcm16(load_audio(QUESTION, sample_rate=24_000)).tobytes()
    (tmp_path / "question.pcm").write_bytes(samples)
    assert printed_by(NODE, AGENT, front, tmp_path) == "done\n"
