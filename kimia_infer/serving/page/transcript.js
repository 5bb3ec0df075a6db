// What was said, turn by turn.

const NAMES = { you: "You", model: "Kimi-Audio" };

export class Transcript {
  /** Complete turns are announced to screen readers; words that arrive one by one are not. */
  constructor(list, scroller, announcer) {
    Object.assign(this, { list, scroller, announcer });
    this.turns = new Map();
    this.ended = false;
  }

  /** The session is over: what is not said stays unsaid, and the model remembers nothing of it. */
  end() {
    for (const { item } of this.turns.values()) item.classList.remove("pending");
    this.ended = this.turns.size > 0;
  }

  /** The turn `id` of "you" or the "model", made at the end of the list if there is none. */
  turn(id, who) {
    const known = this.turns.get(id);
    if (known) return known;
    const item = document.createElement("li");
    if (this.ended) item.dataset.before = "a new conversation";
    this.ended = false;
    const [name, text] = ["b", "p"].map((tag) => item.appendChild(document.createElement(tag)));
    name.textContent = NAMES[who];
    item.className = `${who} pending`;
    const turn = { item, text, who, said: "" };
    this.turns.set(id, turn);
    this.list.append(item);
    this.follow();
    return turn;
  }

  append(id, who, text) {
    const turn = this.turn(id, who);
    turn.said += text;
    turn.text.textContent = turn.said;
    this.follow();
  }

  /** The turn is complete; `text` replaces what it says so far. */
  complete(id, who, text) {
    const turn = this.turn(id, who);
    if (text !== undefined) turn.text.textContent = turn.said = text;
    if (turn.item.classList.contains("pending") && turn.said) {
      this.announcer.textContent = `${NAMES[who]}: ${turn.said}`;
    }
    turn.item.classList.remove("pending");
    this.follow();
  }

  note(id, text) {
    const turn = this.turns.get(id);
    if (!turn) return;
    turn.item.classList.remove("pending");
    const note = turn.item.querySelector("small") ?? turn.item.appendChild(document.createElement("small"));
    note.textContent = text;
    this.follow();
  }

  drop(id) {
    this.turns.get(id)?.item.remove();
    this.turns.delete(id);
  }

  follow() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}
