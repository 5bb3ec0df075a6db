// The microphone's sound at the device's rate becomes 16-bit samples at 24 kHz.
// Resampled here since Firefox opens a microphone in a context of the device's rate alone.

const RATE = 24_000;
const FRAME = 480; // samples of a message, 20 ms
const ZEROS = 16; // of the kernel's sinc, on each side
const PHASES = 256; // positions between two samples that have a kernel of their own

/** Kernels of a windowed sinc, one per phase; `half` taps on each side. */
function kernels(half, cutoff) {
  return Array.from({ length: PHASES }, (_, phase) => {
    const taps = Float32Array.from({ length: 2 * half }, (_, tap) => {
      const t = tap - half + 1 - phase / PHASES;
      const window = Math.max(Math.cos((Math.PI * t) / (2 * half)), 0) ** 2;
      const x = Math.PI * cutoff * t;
      return window * (x === 0 ? 1 : Math.sin(x) / x);
    });
    const sum = taps.reduce((total, tap) => total + tap, 0);
    return taps.map((tap) => tap / sum);
  });
}

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.step = sampleRate / RATE;
    const cutoff = 0.95 / Math.max(this.step, 1);
    this.half = Math.ceil(ZEROS / cutoff);
    this.kernels = kernels(this.half, cutoff);
    this.held = new Float32Array(8192); // input around the position
    this.length = this.half; // silence before the first sample
    this.position = this.half;
    this.frame = new Int16Array(FRAME);
    this.filled = 0;
    this.power = 0;
  }

  process([channels]) {
    if (!channels.length) return true;
    const count = channels[0].length;
    for (let i = 0; i < count; i++) {
      let sum = 0;
      for (const channel of channels) sum += channel[i];
      this.held[this.length++] = sum / channels.length;
    }
    for (; this.position + this.half + 1 < this.length; this.position += this.step) this.take();
    const drop = Math.floor(this.position) - this.half;
    if (drop > 0) {
      this.held.copyWithin(0, drop, this.length);
      this.length -= drop;
      this.position -= drop;
    }
    return true;
  }

  /** One sample at the position. */
  take() {
    const near = Math.round(this.position * PHASES);
    const kernel = this.kernels[near % PHASES];
    const first = Math.floor(near / PHASES) - this.half + 1;
    let sum = 0;
    for (let tap = 0; tap < kernel.length; tap++) sum += kernel[tap] * this.held[first + tap];
    this.power += sum * sum;
    this.frame[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(sum * 32768)));
    if (this.filled < FRAME) return;
    const level = Math.sqrt(this.power / FRAME);
    this.port.postMessage({ samples: this.frame, level }, [this.frame.buffer]);
    this.frame = new Int16Array(FRAME);
    this.filled = 0;
    this.power = 0;
  }
}

registerProcessor("capture", Capture);
