// The page: its controls, and what they do to the session, the microphone and the player.

import { floats, Microphone, MicrophoneError, Player, RATE } from "./audio.js";
import { Conversation } from "./conversation.js";
import { Files } from "./files.js";
import { Server, ServerError } from "./server.js";
import { TalkButton } from "./talk-button.js";
import { Tape } from "./tape.js";
import { Transcript } from "./transcript.js";

const REST = 30_000; // milliseconds without a turn, after which the microphone is closed
const STATES = {
  connecting: "Connecting",
  offline: "Not connected",
  ready: "Ready",
  asking: "Waiting for the microphone",
  listening: "Listening",
  thinking: "Thinking",
  speaking: "Speaking",
};

const $ = (id) => document.getElementById(id);
const talkButton = $("talk");
const controls = [talkButton, $("voice"), $("message"), $("composer").querySelector("button")];

const server = new Server();
const tape = new Tape($("tape"), RATE);
const transcript = new Transcript($("turns"), $("scroll"), $("announcer"));
const player = new Player({
  onstart: () => conversation.sounds(),
  onplayed: (samples) => tape.push("model", samples),
  ondrained: () => {
    tape.rest();
    show();
  },
});
const conversation = new Conversation(server, player, transcript, {
  changed: show,
  failed: (message) => notify(message),
  closed: lost,
  firstSound: (seconds) => {
    $("first-sound").textContent = `first sound after ${seconds.toFixed(2)} s`;
  },
});
const microphone = new Microphone(heard, () => {
  if (talker.on) talker.abort();
  microphone.close();
  notify("The microphone was disconnected.");
});
const talker = new TalkButton(talkButton, { start: startTalking, stop: stopTalking, cancel: cancelTalking });
const files = new Files(
  server,
  {
    drop: $("drop"),
    file: $("file"),
    job: $("job"),
    name: $("job-name"),
    progress: $("job-progress"),
    state: $("job-state"),
    cancel: $("job-cancel"),
    text: $("job-text"),
    downloads: $("job-downloads"),
    saveText: $("save-txt"),
    saveSubtitles: $("save-srt"),
  },
  () => askForKey(false),
);

let connected = false;
let resting; // the timer that closes the microphone

/** Show in which state everything is. */
function show() {
  $("empty").hidden = transcript.turns.size > 0;
  const listening = talker.on && (microphone.ready || "asking");
  const state =
    (!connected && document.body.dataset.state) ||
    (player.playing && "speaking") ||
    (conversation.thinking && "thinking") ||
    (listening === "asking" && "asking") ||
    (listening && "listening") ||
    "ready";
  if (document.body.dataset.state !== state || $("status").textContent !== STATES[state]) enter(state);
  talkButton.setAttribute("aria-pressed", String(talker.on));
  const label = !talker.on ? "Talk" : conversation.handsFree ? "Stop" : "Send";
  talkButton.querySelector("span").textContent = label;
}

function enter(state) {
  document.body.dataset.state = state;
  $("status").textContent = STATES[state];
}

function notify(message, again = false) {
  $("notice").querySelector("p").textContent = message;
  $("notice").hidden = !message;
  $("reconnect").hidden = !again;
}

/** Find out which model and voices there are, and whether a key is needed. */
async function connect() {
  connected = false;
  enter("connecting");
  notify("");
  try {
    const models = await server.get("v1/models");
    const voices = await server.get("v1/audio/voices");
    conversation.model = files.model = models.data[0].id;
    $("voice").replaceChildren(...voiceOptions(voices.data));
    conversation.voice = $("voice").value;
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    if (!lostKey(error)) lost(error);
    return;
  }
  connected = true;
  for (const control of controls) control.disabled = false;
  $("voice").disabled = $("voice").options.length < 2;
  show();
}

/** The voices to choose from, Kokoro's in a group for each language. */
function voiceOptions(voices) {
  const languages = new Intl.DisplayNames(["en"], { type: "language" });
  const groups = new Map();
  const own = [];
  for (const { id, name, language } of voices) {
    const option = new Option((name ?? id).replace("kokoro:", ""), id);
    if (!language) {
      own.push(option);
      continue;
    }
    if (!groups.has(language)) {
      const group = document.createElement("optgroup");
      group.label = `Kokoro, ${languages.of(language)}`;
      groups.set(language, group);
    }
    groups.get(language).append(option);
  }
  return [...own, ...groups.values()];
}

function lostKey({ kind }) {
  if (kind === "key") askForKey(Boolean(server.key));
  return kind === "key";
}

function askForKey(wrong) {
  $("key-wrong").hidden = !wrong;
  $("key").value = "";
  $("key-dialog").showModal();
}

/** The session is over or there is none to be had. */
function lost(error) {
  connected = error.kind === "ended"; // the next turn begins another one
  if (talker.on) talker.abort();
  microphone.close();
  player.stop();
  transcript.end();
  level(0);
  notify(error.message, !connected);
  if (connected) return show();
  for (const control of controls) control.disabled = true;
  enter("offline");
}

/** Open what a turn needs; whether that succeeded. */
async function open(...needed) {
  try {
    await Promise.all([player.open(), conversation.open(), ...needed]);
    return true;
  } catch (error) {
    if (error instanceof MicrophoneError) notify(error.message);
    else if (!(error instanceof ServerError)) {
      notify(`The page failed: ${error.message}`);
      reportError(error);
    } else if (!lostKey(error)) lost(error);
    return false;
  }
}

async function startTalking() {
  clearTimeout(resting);
  notify("");
  if (!conversation.handsFree) conversation.interrupt();
  show();
  if (!(await open(microphone.open()))) {
    talker.on = false;
    level(0);
  }
  if (!talker.on) rest();
  show();
}

function stopTalking() {
  level(0);
  tape.rest();
  if (conversation.handsFree) {
    conversation.discard();
    microphone.close();
  } else {
    if (!conversation.endTurn() && connected) notify("Hold the button while you speak, or tap it to start and stop.");
    rest();
  }
  show();
}

function cancelTalking() {
  level(0);
  tape.rest();
  conversation.discard();
  rest();
  show();
}

function rest() {
  clearTimeout(resting);
  resting = setTimeout(() => microphone.close(), conversation.handsFree ? 0 : REST);
}

/** Samples of the microphone. */
function heard(samples, loudness) {
  if (!talker.on || !conversation.socket) return;
  conversation.hear(samples);
  level(loudness);
  if (!player.playing && (!conversation.handsFree || conversation.hearing)) tape.push("you", floats(samples));
  else if (!player.playing) tape.rest();
}

let shown = 0;

/** Show a loudness from 0 to 1, as decibels; it falls slowly. */
function level(loudness) {
  const now = Math.max(0, Math.min(1, 1 + (20 * Math.log10(loudness + 1e-9)) / 60));
  shown = loudness ? Math.max(now, shown - 0.03) : 0;
  $("level").firstElementChild.style.transform = `scaleX(${shown})`;
  $("level").setAttribute("aria-valuenow", String(Math.round(100 * shown)));
}

async function typed(event) {
  event.preventDefault();
  const text = $("message").value.trim();
  if (!text) return;
  notify("");
  conversation.interrupt();
  if (!(await open())) return;
  $("message").value = "";
  conversation.type(text);
}

function changeMode() {
  if (talker.on) talker.abort();
  microphone.close();
  conversation.handsFree = talker.toggles = document.querySelector("[name=mode]:checked").value === "free";
  conversation.configure();
  show();
}

$("composer").addEventListener("submit", typed);
for (const mode of document.getElementsByName("mode")) mode.addEventListener("change", changeMode);
$("voice").addEventListener("change", () => {
  conversation.voice = $("voice").value;
  conversation.configure();
});
$("reconnect").addEventListener("click", connect);
$("key-dialog").addEventListener("close", () => {
  if (!$("key").value) return lost(new ServerError("refused", "This server asks for a key."));
  server.use($("key").value);
  connect();
});
for (const gesture of ["pointerup", "keydown", "click"]) {
  document.addEventListener(gesture, () => {
    player.wake();
    microphone.wake();
  });
}
window.addEventListener("pagehide", () => conversation.close());
connect();
