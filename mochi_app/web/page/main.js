// @ts-check
// The live half of the page: header, panel and history. The form is Gradio's.
//
// Gradio makes the parts (`live_part` in `ui.py`), before this module has run or after; each comes as
// a call in `window.mochiQueue`. Here they are put together: who hears what of the store.

import { Form, focusFirst, pinSeed, submitByKey } from "./form.js";
import { Gallery } from "./gallery.js";
import { Header } from "./header.js";
import { Panel } from "./panel.js";
import { connect, server } from "./server.js";
import { store } from "./state.js";
import { Stream } from "./stream.js";

/**
 * A place on the page, as Gradio gives it.
 * @typedef {object} Part
 * @property {HTMLElement} element
 * @property {import("./server.js").Functions} server
 * @property {any} props
 * @property {any} events
 */

/** @typedef {{header: Header, form: Form, panel: Panel, gallery: Gallery}} Parts */

/** @type {{[Name in keyof Parts]: (part: Part) => Parts[Name]}} */
const makers = {
  header: (part) => new Header(part.element, store),
  form: (part) => new Form(part, store),
  panel: (part) => {
    connect(part.server);
    return new Panel(part.element, store, part.props);
  },
  gallery: (part) => new Gallery(part.element, store),
};

/** Filled by `attach`; nothing is heard before all are there. */
const parts = /** @type {Parts} */ ({});
const stream = new Stream(store);
let started = false;

/**
 * Fill a part. One that Gradio makes anew is filled anew.
 * @param {keyof Parts} name
 * @param {Part} part
 */
function attach(name, part) {
  Object.assign(parts, { [name]: makers[name](part) });
  if (started) show();
  else if (Object.keys(makers).every((other) => other in parts)) start();
}

function show() {
  parts.header.render();
  parts.panel.render();
  parts.gallery.refresh();
}

function start() {
  started = true;
  server.whoami().then(
    (who) => {
      Object.assign(store.me, who);
      show();
    },
    () => {},
  );
  parts.panel.select(new URL(location.href).searchParams.get("job"));
  parts.gallery.refresh();
  stream.follow();
  focusFirst();
  document.addEventListener("visibilitychange", () => stream.follow());
  window.addEventListener("online", () => stream.follow());
  setInterval(() => {
    stream.check();
    parts.header.render();
    parts.panel.tick();
  }, 1000);
}

store.on("announce", (text) => parts.header.announce(text));
store.on("gate", (gate) => parts.header.showGate(gate));
store.on("connection", () => parts.header.render());
store.on("heard", (changed) => {
  parts.header.render();
  parts.panel.follow(changed);
  parts.gallery.follow(changed);
});
store.on("back", () => {
  parts.header.announce("Connected again.");
  parts.panel.reload();
  parts.gallery.soon();
});
store.on("jobs", () => stream.name());
store.on("selected", () => parts.gallery.markSelected());
store.on("changed", () => parts.gallery.refresh());
store.on("renew", () => parts.panel.renew());
store.on("reuse", (job) => parts.form.reuse(job));
store.on("opened", (job) => {
  parts.panel.select(job.id, job);
  parts.panel.focus();
  parts.panel.reveal();
});
store.on("submitted", (job) => {
  parts.panel.select(job.id, job);
  parts.gallery.refresh();
  parts.header.announce("Job accepted.");
  parts.panel.reveal();
});
document.addEventListener("keydown", submitByKey);
document.addEventListener("input", pinSeed);

/** What Gradio calls. */
const page = {
  attach,
  /** @param {import("./form.js").Outcome | null} outcome */
  submitted: (outcome) => parts.form.submitted(outcome),
  reused: () => parts.form.values(),
  drawn: () => parts.form.drawn,
  reconnect: () => stream.lost(),
};

/** @typedef {(called: typeof page) => void} Call */

const host = /** @type {{Mochi?: typeof page, mochiQueue?: {push: (call: Call) => void}}} */ (
  /** @type {unknown} */ (window)
);
const waiting = /** @type {Call[] | undefined} */ (host.mochiQueue) ?? [];
host.Mochi = page;
host.mochiQueue = { push: (call) => call(page) };
for (const call of waiting) call(page);
