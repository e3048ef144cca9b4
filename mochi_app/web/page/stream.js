// @ts-check
// The stream of events, `/events`: it tells of the jobs that the page names, which are those that it
// shows.

import { ended } from "./jobs.js";

/** @typedef {import("./state.js").Store} Store */
/** @typedef {import("./state.js").StreamEvent} StreamEvent */

const NAME_PAUSE = 50; // ms that the jobs on the page may change before they are named anew
const RETRY_FIRST = 1000; // ms before the stream is opened again; doubles
const RETRY_MOST = 5000;
const SILENCE = 45; // seconds without an event after which the stream counts as dead

export class Stream {
  /** @param {Store} store */
  constructor(store) {
    this.store = store;
    /** @type {EventSource | null} */
    this.source = null;
    this.hidden = false; // whether nobody saw the page when it was opened
    /** @type {Set<string>} */
    this.named = new Set();
    this.retry = RETRY_FIRST;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.timer = undefined;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.renaming = undefined;
  }

  /** The jobs that are shown and may change, or belong to what is in the panel. */
  wanted() {
    return this.store.wanted(document.hidden);
  }

  /** A hidden tab looks now and then at what it waits for, and holds no connection meanwhile: a
   * browser has few of them for one server. */
  follow() {
    clearTimeout(this.timer);
    if (document.hidden && this.wanted().every(ended)) this.close();
    else if (!this.source || this.hidden !== document.hidden) this.open();
  }

  /** Have the server tell of what is on the page by now; jobs that have left it do no harm. */
  name() {
    if (!this.source || this.renaming || this.wanted().every((job) => this.named.has(job.id))) {
      return;
    }
    this.renaming = setTimeout(() => {
      this.renaming = undefined;
      if (this.source) this.open();
    }, NAME_PAUSE);
  }

  open() {
    this.close();
    this.hidden = document.hidden;
    const wanted = this.wanted();
    this.named = new Set(wanted.map((job) => job.id));
    const { live } = this.store;
    live.jobs = new Map([...live.jobs].filter(([jobId]) => this.named.has(jobId)));
    const query = new URLSearchParams({ jobs: [...this.named].join() });
    const pictured = new Set(wanted.filter((job) => !ended(job)).map((job) => job.id));
    if (this.hidden) query.set("hidden", "true");
    else if (pictured.size) query.set("pictures", [...pictured].join());
    const source = new EventSource(`./events?${decodeURIComponent(query.toString())}`);
    source.onmessage = (event) => this.receive(JSON.parse(event.data));
    source.onerror = () => {
      // The server ends the stream of a hidden tab, and the browser comes back when it was told to
      const expected = this.hidden && source.readyState === EventSource.CONNECTING;
      if (source === this.source && !expected) this.lost();
    };
    this.source = source;
  }

  close() {
    this.source?.close();
    this.source = null;
  }

  /** Open the stream again later, each time later than the last. */
  lost() {
    const { live } = this.store;
    this.close();
    live.jobs.clear();
    if (live.connected !== false) {
      live.connected = false;
      this.store.emit("connection");
      this.store.emit("announce", "Connection lost. Trying to reconnect.");
      this.askForLogin();
    }
    this.timer = setTimeout(() => this.follow(), this.retry);
    this.retry = Math.min(this.retry * 2, RETRY_MOST);
  }

  /** Give up a stream that has been silent for too long. */
  check() {
    if (this.source && this.store.live.connected && this.store.sinceEvent() > SILENCE) this.lost();
  }

  /** A stream cannot tell that one has to log in (again). What is typed stays where it is. */
  async askForLogin() {
    const answer = await fetch("./gradio_api/login_check").catch(() => null);
    this.store.live.loggedOut = answer?.status === 401;
    this.store.emit("connection");
  }

  /** @param {StreamEvent} event */
  receive(event) {
    const wasAway = this.store.live.connected === false;
    this.retry = RETRY_FIRST;
    this.store.emit("heard", this.store.receive(event));
    if (wasAway) this.store.emit("back");
    if (document.hidden) this.follow();
  }
}
