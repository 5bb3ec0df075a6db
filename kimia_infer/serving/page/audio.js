// The microphone and the loudspeaker.

export const RATE = 24_000; // of both, in samples a second

/** A microphone that cannot be used; the message says why and what to do. */
export class MicrophoneError extends Error {}

const TYPE = "You can type instead.";
const REASONS = {
  NotAllowedError: `The browser was not allowed to use the microphone. Allow it in the browser's settings for this page, then try again. ${TYPE}`,
  NotFoundError: `No microphone was found. Connect one, then try again. ${TYPE}`,
  NotReadableError: `The microphone could not be opened; another program may be using it. ${TYPE}`,
};

export class Microphone {
  /**
   * `onframe(samples, level)` gets Int16Arrays of 20 ms at 24 kHz and their level, 0 to 1;
   * `onlost()` is called when the microphone is taken away.
   */
  constructor(onframe, onlost) {
    Object.assign(this, { onframe, onlost });
    this.opening = this.context = null;
  }

  /** Whether it hears, which it does only once it is allowed to. */
  get ready() {
    return this.context !== null;
  }

  /** Rejects with a MicrophoneError. */
  open() {
    this.opening ??= this.start().catch((error) => {
      this.opening = null;
      throw error;
    });
    return this.opening;
  }

  async start() {
    if (!window.isSecureContext) {
      throw new MicrophoneError(
        `Browsers give microphone and sound only to pages from https:// or from this computer (http://localhost). You can type, and read the answers.`,
      );
    }
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({
        audio: { echoCancellation: true, noiseSuppression: true, autoGainControl: true },
      });
    } catch (error) {
      throw new MicrophoneError(REASONS[error.name] ?? `The microphone failed: ${error.message}. ${TYPE}`);
    }
    stream.getAudioTracks()[0].onended = () => this.onlost();
    const context = new AudioContext();
    await context.audioWorklet.addModule(new URL("capture.js", import.meta.url));
    const node = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 });
    node.port.onmessage = ({ data }) => this.onframe(data.samples, data.level);
    context.createMediaStreamSource(stream).connect(node);
    this.context = context;
    this.wake();
    return { stream, context, node };
  }

  /** Contexts made without a user's gesture sleep until this is called in one. */
  wake() {
    if (this.context?.state === "suspended") this.context.resume();
  }

  async close() {
    const opening = this.opening;
    this.opening = this.context = null;
    const opened = await opening?.catch(() => null);
    if (!opened) return;
    opened.node.port.onmessage = null;
    for (const track of opened.stream.getTracks()) track.stop();
    await opened.context.close();
  }
}

export class Player {
  /** Calls `onstart()`, `onplayed(samples)` as sound is heard, and `ondrained()` at its end. */
  constructor({ onstart, onplayed, ondrained }) {
    Object.assign(this, { onstart, onplayed, ondrained });
    this.opening = this.context = this.node = null;
    this.generation = 0;
    this.forget();
  }

  forget() {
    this.parts = []; // { item, end }: whose sound ends after how many samples
    this.received = 0;
    this.heard = 0;
    this.playing = false;
  }

  open() {
    this.opening ??= this.start();
    return this.opening;
  }

  /** Browsers play only for pages from safe addresses, too. */
  get able() {
    return window.isSecureContext;
  }

  async start() {
    if (!this.able) return;
    this.context = new AudioContext({ sampleRate: RATE });
    await this.context.audioWorklet.addModule(new URL("playback.js", import.meta.url));
    this.node = new AudioWorkletNode(this.context, "playback", {
      numberOfInputs: 0,
      outputChannelCount: [1],
    });
    this.node.port.onmessage = ({ data }) => this.told(data);
    this.node.connect(this.context.destination);
    this.wake();
  }

  wake() {
    if (this.context?.state === "suspended") this.context.resume();
  }

  /** Whether there is sound that was not heard yet. */
  get waiting() {
    return this.received > this.heard;
  }

  told({ generation, started, played, drained }) {
    if (generation !== this.generation) return; // of what was stopped
    if (started) {
      this.playing = true;
      this.onstart();
    } else if (played) {
      this.heard += played.length;
      this.onplayed(played);
    } else if (drained) {
      this.forget();
      this.ondrained();
    }
  }

  /** Add float samples of the answer `item`. */
  play(item, samples) {
    this.received += samples.length;
    const last = this.parts.at(-1);
    if (last?.item === item) last.end = this.received;
    else this.parts.push({ item, start: this.received - samples.length, end: this.received });
    this.node.port.postMessage({ samples }, [samples.buffer]);
  }

  /** No more sound of this answer comes. */
  end() {
    this.node?.port.postMessage({ end: true });
  }

  /** Stop at once; `{ item, milliseconds }`: what was heard of the answer that played, or null. */
  stop() {
    if (!this.node) return null;
    const latency = (this.context.outputLatency || 0) * RATE; // computed, but not heard yet
    const heard = Math.max(this.heard - latency, 0);
    const part = this.parts.find(({ end }) => heard < end);
    this.forget();
    this.node.port.postMessage({ generation: ++this.generation });
    if (!part) return null;
    const samples = Math.max(heard - part.start, 0);
    return { item: part.item, milliseconds: Math.floor((1000 * samples) / RATE) };
  }
}

/** Base64 of 16-bit samples. */
export function encode(samples) {
  const bytes = new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength);
  return btoa(String.fromCharCode(...bytes));
}

/** Float samples, full scale 1, of base64 of 16-bit samples. */
export function decode(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return Float32Array.from(new Int16Array(bytes.buffer, 0, bytes.length >> 1), (value) => value / 32768);
}

/** Float samples of 16-bit ones. */
export function floats(samples) {
  return Float32Array.from(samples, (value) => value / 32768);
}
