"""The examples of docs/openai.md print what stands below them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documentation import Block, blocks
from tests.paths import ROOT
from tests.serving.helpers import Server

PAGE = ROOT / "docs" / "openai.md"
WRITTEN_URL = "http://127.0.0.1:8000"

INTERPRETERS = {"python": [sys.executable, "-"], "sh": ["bash", "-euo", "pipefail"]}
EXAMPLES = [
    (language, block)
    for language in INTERPRETERS
    for block in blocks(PAGE, language)
    if not block.text.startswith("scripts/serve")
]


def printed(command: list[str], text: str, front: Server, folder: Path) -> str:
    """What an example prints that stands in ``folder``, beside the scripts of a checkout."""
    (folder / "scripts").symlink_to(ROOT / "scripts")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    text = text.replace(WRITTEN_URL, front.url)
    done = subprocess.run(
        command,
        input=text,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("language", "block"), EXAMPLES)
def test_examples_print_what_stands_below_them(
    front: Server, tmp_path: Path, language: str, block: Block
) -> None:
    assert WRITTEN_URL in block.text and block.output
    assert printed(INTERPRETERS[language], block.text, front, tmp_path).strip() == (
        block.output.strip()
    )


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory, long: bool) -> Path:
    """A folder with OpenAI's package for Node.js."""
    if not long:
        pytest.skip("installs packages; runs with --long")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("node")
    install = ["npm", "install", "--no-audit", "--no-fund", "openai"]
    subprocess.run(install, cwd=folder, check=True, capture_output=True, timeout=300)
    return folder


NODE = ["node", "--input-type=module", "-"]


def test_the_javascript_example(front: Server, node_folder: Path, tmp_path: Path) -> None:
    [block] = blocks(PAGE, "js")
    (tmp_path / "node_modules").symlink_to(node_folder / "node_modules")
    assert printed(NODE, block.text, front, tmp_path).strip() == block.output.strip()


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
    assert printed(NODE, EVERYTHING, front, tmp_path) == "done\n"
