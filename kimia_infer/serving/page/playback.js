// Plays samples that arrive in pieces. A little sound is gathered before it begins, and more after
// each gap, so that late pieces are not heard.

const FIRST = 0.08; // seconds to gather at first
const MOST = 0.64; // after gaps, which double it
const REPORT = 1024; // samples of a report of what was played

class Playback extends AudioWorkletProcessor {
  constructor() {
    super();
    this.ring = new Float32Array(1 << 17);
    this.generation = 0; // of what was not cleared; reports carry it
    this.report = new Float32Array(REPORT);
    this.reset();
    this.port.onmessage = ({ data }) => {
      if (data.samples) this.append(data.samples);
      else if (data.end) this.ended = true;
      else {
        this.generation = data.generation;
        this.reset();
      }
    };
  }

  reset() {
    this.read = 0; // samples ever, modulo the ring's length its index
    this.write = 0;
    this.reported = 0;
    this.ended = true;
    this.begun = false; // the first sample of an answer was played
    this.playing = false;
    this.gather = FIRST * sampleRate;
  }

  append(samples) {
    const filled = this.write - this.read;
    if (filled + samples.length > this.ring.length) this.grow(filled + samples.length);
    const at = this.write % this.ring.length;
    const fitting = Math.min(samples.length, this.ring.length - at);
    this.ring.set(samples.subarray(0, fitting), at);
    this.ring.set(samples.subarray(fitting), 0);
    this.write += samples.length;
    this.ended = false;
  }

  grow(least) {
    const larger = new Float32Array(2 ** Math.ceil(Math.log2(least)));
    for (let i = this.read; i < this.write; i++) {
      larger[i % larger.length] = this.ring[i % this.ring.length];
    }
    this.ring = larger;
  }

  process(_inputs, [[out]]) {
    const filled = this.write - this.read;
    if (!this.playing) {
      if (!filled || (!this.ended && filled < this.gather)) return true;
      this.playing = true;
      if (!this.begun) this.post({ started: true });
      this.begun = true;
    }
    const count = Math.min(out.length, filled);
    for (let i = 0; i < count; i++) {
      const sample = this.ring[this.read++ % this.ring.length];
      out[i] = sample;
      this.report[this.reported++] = sample;
      if (this.reported === REPORT) this.tell();
    }
    if (count < out.length) this.rest();
    return true;
  }

  /** Nothing is left: the end of an answer, or a gap. */
  rest() {
    this.playing = false;
    this.tell();
    if (this.ended) {
      this.begun = false;
      this.gather = FIRST * sampleRate;
      this.post({ drained: true });
    } else {
      this.gather = Math.min(2 * this.gather, MOST * sampleRate);
      this.post({ gap: true });
    }
  }

  tell() {
    if (this.reported) this.post({ played: this.report.slice(0, this.reported) });
    this.reported = 0;
  }

  post(message) {
    this.port.postMessage({ ...message, generation: this.generation });
  }
}

registerProcessor("playback", Playback);
