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
    form.append("model", this.model);
    form.append("response_format", "verbose_json");
    form.append("file", file);
    const request = new XMLHttpRequest(); // which tells how much was sent; fetch does not
    this.request = request;
    request.open("POST", this.server.address("v1/audio/transcriptions"));
    for (const [header, value] of Object.entries(this.server.headers)) {
      request.setRequestHeader(header, value);
    }
    request.responseType = "json";
    request.upload.onprogress = ({ loaded, total }) => {
      progress.value = loaded / total;
      this.say(`Sending, ${Math.round((100 * loaded) / total)} %`);
    };
    request.upload.onload = () => {
      progress.removeAttribute("value"); // which makes it one of unknown length
      this.say("Listening to it");
    };
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

  answered(request, name) {
    if (request.status !== 200) {
      const error = refusal(request.status, request.response);
      this.finish(error.message);
      if (error.kind === "key") this.locked();
      return;
    }
    const { text, segments, duration } = request.response;
    this.finish(`${duration.toFixed(1)} s of sound`);
    const { text: shown, downloads, saveText, saveSubtitles } = this.elements;
    shown.textContent = text || "There are no words in it.";
    shown.hidden = false;
    const stem = name.replace(/\.[^.]+$/, "");
    this.offer(saveText, `${stem}.txt`, `${text}\n`, "text/plain");
    this.offer(saveSubtitles, `${stem}.srt`, subtitles(segments), "application/x-subrip");
    downloads.hidden = false;
  }

  offer(link, name, content, type) {
    const url = URL.createObjectURL(new Blob([content], { type }));
    this.urls.push(url);
    link.href = url;
    link.download = name;
  }
}
