// A realtime session: events of the server become turns and sound, what people do becomes events.

import { decode, encode, RATE } from "./audio.js";
import { ServerError } from "./server.js";

const SHORTEST = 0.2 * RATE; // samples of a turn; less is a slip of the finger
const BUSY = 1013; // WebSocket's "try again later"
const RULES = 1008; // its "policy violation"

const ENDINGS = new Set(["session_expired", "session_idle"]); // errors after which it is closed

const VAD = { type: "server_vad", create_response: true, interrupt_response: true };

export class Conversation {
  /** `on` has `changed()`, `failed(message)`, `closed(ServerError)` and `firstSound(seconds)`. */
  constructor(server, player, transcript, on) {
    Object.assign(this, { server, player, transcript, on });
    this.model = "";
    this.voice = "";
    this.handsFree = false;
    this.socket = null;
    this.forget();
  }

  forget() {
    this.opening = null;
    this.response = null; // the id of the answer that the server is making
    this.asked = 0; // answers that were asked for and are not begun
    this.unwanted = 0; // those of them that were interrupted
    this.silenced = new Set(); // ids of answers that were interrupted
    this.sent = 0; // samples of the turn that is being said
    this.turnEnded = null; // when; until the answer's first sound
    this.hearing = false; // by the server's ear, hands-free
    this.writesOnly = false; // the server has no voice of its own
    this.farewell = ""; // why the server will close the session
  }

  get thinking() {
    return this.turnEnded !== null;
  }

  /** Resolves once the session is there. Rejects with a ServerError. */
  open() {
    this.opening ??= this.start().catch((error) => {
      this.forget();
      throw error;
    });
    return this.opening;
  }

  start() {
    return new Promise((resolve, reject) => {
      const socket = this.server.socket(this.model);
      let open = false;
      socket.onmessage = ({ data }) => {
        const event = JSON.parse(data);
        if (event.type === "session.created") {
          open = true;
          this.socket = socket;
          this.writesOnly = event.session.output_modalities?.[0] === "text";
          this.configure();
          resolve();
        }
        this.receive(event);
      };
      socket.onclose = async (event) => {
        const error = await this.reason(event);
        if (!open) return reject(error);
        if (this.socket !== socket) return;
        this.socket = null;
        this.forget();
        this.on.closed(error);
      };
    });
  }

  /** Why the socket was closed. Browsers hide how a server refused one, so it is asked again. */
  async reason({ code, reason }) {
    if (code === BUSY) return new ServerError("busy", reason || "The server is busy.");
    if (code === RULES && reason) return new ServerError("refused", reason);
    try {
      await this.server.get("v1/models");
    } catch (error) {
      return error;
    }
    if (code === 1000) {
      const why = this.farewell || reason || "the server closed it";
      return new ServerError("ended", `The session ended: ${why}. Your next words begin another one.`);
    }
    return new ServerError("busy", reason || "The server took no session or ended it; it may be busy.");
  }

  close() {
    const socket = this.socket;
    this.socket = null;
    this.forget();
    socket?.close();
  }

  send(event) {
    this.socket?.send(JSON.stringify(event));
  }

  /** Tell the server how turns end and which voice answers. */
  configure() {
    const input = {
      format: { type: "audio/pcm", rate: RATE },
      transcription: { model: this.model },
      turn_detection: this.handsFree ? VAD : null,
    };
    const speaks = this.player.able && (!this.writesOnly || this.voice?.startsWith("kokoro:"));
    const output = { format: { type: "audio/pcm", rate: RATE }, ...(this.voice && { voice: this.voice }) };
    this.send({
      type: "session.update",
      session: {
        type: "realtime",
        output_modalities: [speaks ? "audio" : "text"],
        audio: { input, output },
      },
    });
  }

  /** Add Int16 samples to the turn that is being said. */
  hear(samples) {
    this.sent += samples.length;
    this.send({ type: "input_audio_buffer.append", audio: encode(samples) });
  }

  /** The turn is said; false if it was too short to be one. */
  endTurn() {
    const enough = this.sent >= SHORTEST;
    if (!enough) this.discard();
    else {
      this.send({ type: "input_audio_buffer.commit" });
      this.answer();
    }
    this.sent = 0;
    return enough;
  }

  /** Forget what was said since the last turn. */
  discard() {
    this.sent = 0;
    this.hearing = false;
    this.send({ type: "input_audio_buffer.clear" });
  }

  type(text) {
    const content = [{ type: "input_text", text }];
    this.send({ type: "conversation.item.create", item: { type: "message", role: "user", content } });
    this.answer();
  }

  answer() {
    this.turnEnded = performance.now();
    this.asked++;
    this.send({ type: "response.create" });
    this.on.changed();
  }

  /** Stop the answer that is made or played; the server learns what was heard of it. */
  interrupt() {
    this.unwanted = this.asked;
    if (this.response) this.cancel();
    this.quiet();
  }

  cancel() {
    this.silenced.add(this.response);
    this.send({ type: "response.cancel", response_id: this.response });
  }

  quiet() {
    this.turnEnded = null;
    const heard = this.player.stop();
    if (!heard) return;
    this.send({
      type: "conversation.item.truncate",
      item_id: heard.item,
      content_index: 0,
      audio_end_ms: heard.milliseconds,
    });
    this.transcript.note(heard.item, "interrupted");
  }

  /** The player began to play an answer. */
  sounds() {
    if (this.turnEnded !== null) this.on.firstSound((performance.now() - this.turnEnded) / 1000);
    this.turnEnded = null;
    this.on.changed();
  }

  receive(event) {
    EVENTS[event.type]?.(this, event);
    this.on.changed();
  }
}

const EVENTS = {
  error: (self, { error }) => {
    if (error.code === "response_cancel_not_active") return; // it had just ended
    if (ENDINGS.has(error.code)) self.farewell = error.message;
    else self.on.failed(error.message);
  },

  "input_audio_buffer.speech_started": (self, event) => {
    self.hearing = true;
    if (self.response) self.silenced.add(self.response); // the server ends it by itself
    self.quiet();
    self.transcript.turn(event.item_id, "you");
  },

  "input_audio_buffer.speech_stopped": (self) => {
    self.hearing = false;
    self.turnEnded = performance.now();
  },

  "input_audio_buffer.committed": (self, event) => {
    self.transcript.turn(event.item_id, "you");
  },

  "conversation.item.added": (self, { item }) => {
    if (item.role !== "user") return;
    const typed = item.content?.find(({ type }) => type === "input_text");
    if (typed) self.transcript.complete(item.id, "you", typed.text);
    else self.transcript.turn(item.id, "you");
  },

  "conversation.item.deleted": (self, event) => self.transcript.drop(event.item_id),

  "conversation.item.input_audio_transcription.delta": (self, event) => {
    self.transcript.append(event.item_id, "you", event.delta);
  },

  "conversation.item.input_audio_transcription.completed": (self, event) => {
    self.transcript.complete(event.item_id, "you", event.transcript.trim());
    if (!event.transcript.trim()) self.transcript.note(event.item_id, "no words understood");
  },

  "conversation.item.input_audio_transcription.failed": (self, event) => {
    self.transcript.note(event.item_id, event.error?.message ?? "no transcript");
  },

  "response.created": (self, { response }) => {
    self.response = response.id;
    if (self.asked) self.asked--;
    if (!self.unwanted) return;
    self.unwanted--;
    self.cancel();
  },

  "response.output_item.added": (self, { item }) => {
    if (item.type === "message") self.transcript.turn(item.id, "model");
  },

  "response.output_audio_transcript.delta": said,
  "response.output_text.delta": said,

  "response.output_audio.delta": (self, event) => {
    if (!self.silenced.has(event.response_id)) self.player.play(event.item_id, decode(event.delta));
  },

  "response.output_audio.done": (self, event) => {
    if (!self.silenced.has(event.response_id)) self.player.end();
  },

  "response.done": (self, { response }) => {
    if (self.response === response.id) self.response = null;
    const silenced = self.silenced.delete(response.id);
    if (!silenced) self.player.end();
    if (!silenced && !self.player.waiting) self.turnEnded = null; // it has no sound
    for (const item of response.output ?? []) {
      if (item.type !== "message") continue;
      self.transcript.complete(item.id, "model");
      const why = outcome(response);
      if (why) self.transcript.note(item.id, why);
    }
    if (response.status === "failed") {
      self.on.failed(response.status_details?.error?.message ?? "The answer failed.");
    }
  },
};

function said(self, event) {
  self.transcript.append(event.item_id, "model", event.delta);
}

/** What a complete answer leaves to be said about how it ended. */
function outcome({ status, status_details: details }) {
  if (status === "cancelled") return "interrupted";
  if (status !== "incomplete") return "";
  return details?.reason === "max_output_tokens" ? "cut at the longest answer" : "incomplete";
}
