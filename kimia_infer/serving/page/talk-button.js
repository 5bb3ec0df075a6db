// One button, by mouse, touch, keyboard or screen reader: held while one speaks, or tapped to start
// and again to stop.

const TAP = 350; // milliseconds; a longer press is held

const KEYS = "input:not([type=radio]), select, button, a"; // have another use for the space bar

export class TalkButton {
  /** `start()` and `stop()` are called in turns; `cancel()` in place of stop. */
  constructor(button, { start, stop, cancel }) {
    Object.assign(this, { button, start, stop, cancel });
    this.toggles = false; // every press starts or stops, as hands-free
    this.on = false;
    this.pressed = null; // since when
    this.listen();
  }

  listen() {
    const { button } = this;
    button.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      button.setPointerCapture(event.pointerId);
      this.down();
    });
    for (const type of ["pointerup", "pointercancel"]) button.addEventListener(type, () => this.up());
    button.addEventListener("contextmenu", (event) => event.preventDefault());
    button.addEventListener("click", (event) => {
      if (event.detail === 0) this.tap(); // of a screen reader; others were heard above
    });
    document.addEventListener("keydown", (event) => {
      if (event.code === "Escape" && this.on) this.abort();
      if (!this.concerns(event)) return;
      event.preventDefault(); // no click follows, and the page does not scroll
      if (!event.repeat) this.down();
    });
    document.addEventListener("keyup", (event) => {
      if (!this.concerns(event)) return;
      event.preventDefault();
      this.up();
    });
    window.addEventListener("blur", () => this.up());
  }

  /** The space bar anywhere but where it has another use, and the button's own keys. */
  concerns({ code, target, altKey, ctrlKey, metaKey }) {
    if (this.button.disabled || altKey || ctrlKey || metaKey) return false;
    if (target === this.button) return code === "Space" || code === "Enter";
    return code === "Space" && !target.matches(KEYS);
  }

  down() {
    if (this.button.disabled || this.pressed !== null) return;
    this.pressed = performance.now();
    if (this.on) {
      this.pressed = null; // its second tap
      this.finish();
    } else this.begin();
  }

  up() {
    if (this.pressed === null) return;
    const held = performance.now() - this.pressed > TAP;
    this.pressed = null;
    if (held && this.on && !this.toggles) this.finish();
  }

  tap() {
    if (this.on) this.finish();
    else this.begin();
  }

  begin() {
    this.on = true;
    this.start();
  }

  finish() {
    this.on = false;
    this.stop();
  }

  abort() {
    this.on = false;
    this.pressed = null;
    this.cancel();
  }
}
