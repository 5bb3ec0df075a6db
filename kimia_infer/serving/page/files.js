// A recording is sent to be transcribed; its transcript can be saved as text and as subtitles.

import { GONE, refusal } from "./server.js";

/** Seconds as subtitles write them: 01:02:03,456. */
function clock(seconds) {
  const whole = Math.round(1000 * seconds);
  const parts = [whole / 3_600_000, (whole / 60_000) % 60, (whole / 1000) % 60].map(Math.floor);
  return `${parts.map((part) => String(part).padStart(2, "0")).join(":")},${String(whole % 1000).padStart(3, "0")}`;
}

function subtitles(segments) {
  return segments
    .map(({ start, end, text }, i) => `${i + 1}\n${clock(start)} --> ${clock(end)}\n${text.trim()}\n`)
    .join("\n");
}

/** The length of a recording in seconds, null where the browser cannot read it. */
function lengthOf(file) {
  return new Promise((resolve) => {
    const url = URL.createObjectURL(file);
    const player = new Audio();
    const found = (seconds) => {
      URL.revokeObjectURL(url);
      resolve(Number.isFinite(seconds) ? seconds : null);
    };
    player.onloadedmetadata = () => found(player.duration);
    player.onerror = () => found(null);
    player.preload = "metadata";
    player.src = url;
  });
}

export class Files {
  /** `elements` are those of the page by their ids; `locked()` asks for a key. */
  constructor(server, elements, locked) {
    Object.assign(this, { server, elements, locked });
    this.model = "";
    this.request = null;
    this.urls = [];
    const { drop, file, cancel } = elements;
    file.addEventListener("change", () => {
      if (file.files.length) this.send(file.files[0]);
      file.value = ""; // so that the same file can be chosen again
    });
    for (const type of ["dragenter", "dragover"]) {
      document.addEventListener(type, (event) => {
        if (!event.dataTransfer?.types.includes("Files")) return;
        event.preventDefault();
        drop.classList.add("over");
      });
    }
    for (const type of ["dragleave", "drop"]) {
      document.addEventListener(type, () => drop.classList.remove("over"));
    }
    document.addEventListener("drop", (event) => {
      if (!event.dataTransfer?.files.length) return;
      event.preventDefault();
      this.send(event.dataTransfer.files[0]);
    });
    cancel.addEventListener("click", () => this.request?.abort());
  }

  send(file) {
    const { job, name, progress, text, downloads, cancel } = this.elements;
    this.request?.abort();
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
    name.textContent = file.name;
    job.hidden = progress.hidden = cancel.hidden = false;
    text.hidden = downloads.hidden = true;

    const form = new FormData();
    const fields = { model: this.model, response_format: "verbose_json", stream: "true" };
    for (const [field, value] of Object.entries(fields)) form.append(field, value);
    form.append("file", file);
    this.segments = [];
    this.text = this.error = null;
    this.read = 0; // characters of the answer
    this.seconds = lengthOf(file);
    const request = new XMLHttpRequest(); // which tells how much was sent; fetch does not
    this.request = request;
    request.open("POST", this.server.address("v1/audio/transcriptions"));
    for (const [header, value] of Object.entries(this.server.headers)) {
      request.setRequestHeader(header, value);
    }
    request.upload.onprogress = ({ loaded, total }) => {
      progress.value = loaded / total;
      this.say(`Sending, ${Math.round((100 * loaded) / total)} %`);
    };
    request.upload.onload = () => {
      progress.removeAttribute("value"); // which makes it one of unknown length
      this.say("Listening to it");
    };
    request.onprogress = () => this.arrived(request);
    request.onload = () => this.answered(request, file.name);
    request.onerror = () => this.finish(GONE);
    request.onabort = () => this.request === request && this.finish("Cancelled");
    this.say("Sending");
    request.send(form);
  }

  say(state) {
    this.elements.state.textContent = state;
  }

  finish(state) {
    this.request = null;
    this.elements.progress.hidden = this.elements.cancel.hidden = true;
    this.say(state);
  }

  /** Read the events of the answer that are complete. */
  async arrived(request) {
    if (request.status !== 200) return;
    const end = request.responseText.lastIndexOf("\n\n");
    const events = request.responseText.slice(this.read, end).split("\n\n");
    this.read = Math.max(end, this.read);
    for (const line of events.flatMap((event) => event.split("\n"))) {
      if (line.startsWith("data: ")) this.told(JSON.parse(line.slice(6)));
    }
    const seconds = await this.seconds;
    const heard = this.segments.at(-1)?.end;
    if (heard === undefined || this.request !== request) return;
    if (seconds) this.elements.progress.value = heard / seconds;
    this.say(`Heard ${heard.toFixed(0)} s${seconds ? ` of ${seconds.toFixed(0)} s` : ""}`);
  }

  told(event) {
    const { text } = this.elements;
    if (event.error) this.error = event.error.message;
    if (event.type === "transcript.text.segment") this.segments.push(event);
    if (event.type === "transcript.text.done") this.text = event.text;
    if (event.type !== "transcript.text.delta") return;
    if (text.hidden) text.textContent = "";
    text.hidden = false;
    text.textContent += event.delta;
  }

  answered(request, name) {
    if (request.status !== 200) {
      const error = refusal(request.status, JSON.parse(request.responseText || "null"));
      this.finish(error.message);
      if (error.kind === "key") this.locked();
      return;
    }
    this.arrived(request);
    if (this.text === null) return this.finish(this.error ?? GONE);
    this.finish("Done");
    const { text, downloads, saveText, saveSubtitles } = this.elements;
    text.textContent = this.text || "There are no words in it.";
    text.hidden = false;
    const stem = name.replace(/\.[^.]+$/, "");
    this.offer(saveText, `${stem}.txt`, `${this.text}\n`, "text/plain");
    this.offer(saveSubtitles, `${stem}.srt`, subtitles(this.segments), "application/x-subrip");
    downloads.hidden = false;
  }

  offer(link, name, content, type) {
    const url = URL.createObjectURL(new Blob([content], { type }));
    this.urls.push(url);
    link.href = url;
    link.download = name;
  }
}
