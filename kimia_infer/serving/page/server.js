// Requests to the server this page came from, at addresses relative to the page's own.

/** `kind` is "key", "busy", "gone" or "refused"; the message is for people. */
export class ServerError extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

export const GONE = "The server does not answer. It may have stopped, or the network is down.";
const STORED = "kimi-audio-key";

export class Server {
  constructor() {
    this.key = sessionStorage.getItem(STORED) ?? "";
  }

  use(key) {
    this.key = key;
    sessionStorage.setItem(STORED, key);
  }

  address(path) {
    return new URL(path, document.baseURI);
  }

  get headers() {
    return this.key ? { Authorization: `Bearer ${this.key}` } : {};
  }

  /** The JSON at `path`. Rejects with a ServerError. */
  async get(path) {
    let response;
    try {
      response = await fetch(this.address(path), { headers: this.headers, cache: "no-store" });
    } catch {
      throw new ServerError("gone", GONE);
    }
    const body = await response.json().catch(() => null);
    if (!response.ok) throw refusal(response.status, body);
    return body;
  }

  /** A WebSocket to /v1/realtime; browsers send a key as a subprotocol. */
  socket(model) {
    const address = this.address("v1/realtime");
    address.protocol = address.protocol.replace("http", "ws");
    address.searchParams.set("model", model);
    const key = this.key ? [`openai-insecure-api-key.${this.key}`] : [];
    try {
      return new WebSocket(address, ["realtime", ...key]);
    } catch {
      throw new ServerError("refused", "Browsers can send keys of letters, digits and - . _ ~ alone.");
    }
  }
}

/** The ServerError of an answer with this status and body. */
export function refusal(status, body) {
  const said = body?.error?.message ?? `it answered with status ${status}`;
  if (status === 401) return new ServerError("key", "The server asks for a key.");
  if (status === 429 || status === 503) {
    return new ServerError("busy", `The server is busy (${said}). Try again in a moment.`);
  }
  if (status === 502 || status === 504) return new ServerError("gone", GONE);
  return new ServerError("refused", `The server refused: ${said}`);
}
