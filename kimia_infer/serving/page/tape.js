// A spectrogram that grows to the right while somebody is heard.

const SIZE = 1024; // samples of a window
const HOP = 240; // samples of a column: 10 ms, one pixel
const ROWS = 96;
const HIGHEST = 8000; // Hz, of the top row
const [QUIET, LOUD] = [-72, -22]; // decibels of full scale, from invisible to full colour
const KEPT = 4096; // columns

const mel = (hertz) => 2595 * Math.log10(1 + hertz / 700);
const hertz = (mels) => 700 * (10 ** (mels / 2595) - 1);

export class Tape {
  constructor(canvas, rate) {
    this.canvas = canvas;
    this.columns = []; // { who, rows }
    this.samples = new Float32Array(SIZE);
    this.who = null;
    this.filled = 0;
    this.fresh = false;
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    this.window = Float32Array.from({ length: SIZE }, (_, i) => Math.sin((Math.PI * i) / SIZE) ** 2);
    this.edges = Array.from({ length: ROWS + 1 }, (_, row) =>
      (hertz((mel(HIGHEST) * row) / ROWS) * SIZE) / rate);
    this.colour();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.colour());
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  colour() {
    const style = getComputedStyle(this.canvas);
    const rgb = (name) => {
      const digits = style.getPropertyValue(name).trim().slice(1);
      return [0, 2, 4].map((at) => Number.parseInt(digits.slice(at, at + 2), 16));
    };
    this.colours = { you: rgb("--you"), model: rgb("--accent") };
    this.draw();
  }

  /** Add float samples of "you" or the "model". */
  push(who, samples) {
    if (who !== this.who) this.rest();
    this.who = who;
    for (const sample of samples) {
      this.samples[SIZE - HOP + this.filled++] = sample;
      if (this.filled < HOP) continue;
      this.columns.push({ who, rows: this.rows() });
      this.samples.copyWithin(0, HOP);
      this.filled = 0;
    }
    if (this.columns.length > 2 * KEPT) this.columns.splice(0, KEPT);
    if (!this.still.matches) this.refresh();
  }

  /** Nobody is heard: a short blank. */
  rest() {
    if (this.who === null) return;
    this.who = null;
    this.filled = 0;
    this.samples.fill(0);
    for (let i = 0; i < 12; i++) this.columns.push({ who: "you", rows: new Uint8Array(ROWS) });
    this.refresh();
  }

  refresh() {
    if (this.fresh) return;
    this.fresh = true;
    requestAnimationFrame(() => this.draw());
  }

  /** Level of each row of the present window, 0 to 255. */
  rows() {
    const power = spectrum(this.samples, this.window);
    return Uint8Array.from({ length: ROWS }, (_, row) => {
      const first = Math.round(this.edges[row]);
      const last = Math.max(Math.round(this.edges[row + 1]), first + 1);
      let most = 0;
      for (let bin = first; bin < last; bin++) most = Math.max(most, power[bin]);
      const level = 10 * Math.log10(most + 1e-12);
      return Math.max(0, Math.min(255, (255 * (level - QUIET)) / (LOUD - QUIET)));
    });
  }

  draw() {
    this.fresh = false;
    const width = this.canvas.clientWidth;
    if (!width) return;
    this.canvas.width = width;
    this.canvas.height = ROWS;
    const shown = this.columns.slice(-width);
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(width, ROWS);
    shown.forEach(({ who, rows }, column) => {
      const [red, green, blue] = this.colours[who];
      for (let row = 0; row < ROWS; row++) {
        image.data.set([red, green, blue, rows[row]], 4 * ((ROWS - 1 - row) * width + column));
      }
    });
    context.putImageData(image, 0, 0);
  }
}

/** Power of each frequency, 1 for a sine of full scale; `samples` are of a power of two. */
function spectrum(samples, window) {
  const size = samples.length;
  const real = new Float32Array(size);
  const imaginary = new Float32Array(size);
  for (let i = 0, reversed = 0; i < size; i++) {
    real[reversed] = samples[i] * window[i];
    let bit = size >> 1;
    for (; reversed & bit; bit >>= 1) reversed ^= bit;
    reversed ^= bit;
  }
  for (let half = 1; half < size; half *= 2) {
    for (let k = 0; k < half; k++) {
      const [c, s] = [Math.cos((Math.PI * k) / half), -Math.sin((Math.PI * k) / half)];
      for (let i = k; i < size; i += 2 * half) {
        const j = i + half;
        const [x, y] = [c * real[j] - s * imaginary[j], c * imaginary[j] + s * real[j]];
        real[j] = real[i] - x;
        imaginary[j] = imaginary[i] - y;
        real[i] += x;
        imaginary[i] += y;
      }
    }
  }
  const full = size / 4; // a sine's peak under this window
  return real.map((value, i) => (value ** 2 + imaginary[i] ** 2) / full ** 2);
}
