// @ts-check
// The form is Gradio's components; only what passes between them and the panel is here.

import { h, setText } from "./dom.js";

/** @typedef {import("./jobs.js").Job} Job */
/** @typedef {import("./state.js").Store} Store */

/**
 * The form's part, as Gradio gives it.
 * @typedef {object} FormPart
 * @property {HTMLElement} element
 * @property {{fields: string[]}} props `fields` are the form's components in Gradio's order
 * @property {{drawn: () => void, reuse: () => void}} events by which Gradio asks for values
 */

/** @typedef {{error?: string, job?: Job}} Outcome what became of a Generate */

export class Form {
  /**
   * @param {FormPart} part
   * @param {Store} store
   */
  constructor(part, store) {
    this.part = part;
    this.store = store;
    /** The job whose values are wanted in the form. @type {Job | null} */
    this.reused = null;
    this.drawn = ""; // the newest job's seed
    this.message = h("p", { className: "m-problem", role: "alert", hidden: true });
    part.element.replaceChildren(this.message);
  }

  /** @param {Outcome | null} outcome */
  submitted(outcome) {
    if (!outcome) return;
    this.message.hidden = !outcome.error;
    setText(this.message, outcome.error ?? "");
    if (!outcome.job) return;
    this.drawn = String(outcome.job.seed);
    this.part.events.drawn();
    this.store.emit("submitted", outcome.job);
  }

  /** @param {Job} job */
  reuse(job) {
    this.reused = job;
    this.part.events.reuse();
    focus();
    this.store.emit("announce", "Prompt, seed and settings are in the form.");
  }

  /** What Gradio puts into the form's components, in its order. */
  values() {
    if (!this.reused) return [];
    const loras = document.getElementById("mochi-lora") !== null;
    return formValues(this.reused, this.part.props.fields, loras);
  }
}

/**
 * A job's values for the fields of the form, in their order.
 * @param {Job} job
 * @param {string[]} fields names of parameters, and the form's own `random_seed`
 * @param {boolean} loras whether there are any on offer: else the field is not there
 * @returns {unknown[]}
 */
export function formValues(job, fields, loras) {
  /** @type {Record<string, unknown>} */
  const values = {
    ...job,
    random_seed: false,
    seed: String(job.seed),
    lora: loras ? (job.lora ?? "") : "",
  };
  return fields.map((name) => values[name]);
}

function focus() {
  /** @type {HTMLElement | null} */
  const prompt = document.querySelector("#mochi-prompt-box textarea");
  prompt?.focus({ preventScroll: true });
}

/**
 * Where most visits begin, as soon as Gradio shows the form. Its own autofocus would take the
 * focus back whenever the text changes.
 */
export function focusFirst(frames = 300) {
  if (document.activeElement !== document.body || frames === 0) return;
  focus();
  requestAnimationFrame(() => focusFirst(frames - 1));
}

/**
 * A seed that is typed or pasted is meant. (Gradio's own input event misses a paste.)
 * @param {Event} event
 */
export function pinSeed({ target: field }) {
  if (!(field instanceof HTMLInputElement) || !field.value) return;
  if (!field.matches("#mochi-seed input[type=text]")) return;
  /** @type {HTMLInputElement | null} */
  const random = document.querySelector("#mochi-seed input[type=checkbox]");
  if (random?.checked) random.click();
}

/**
 * Ctrl+Enter anywhere in the form is Generate.
 * @param {KeyboardEvent} event
 */
export function submitByKey(event) {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  if (!(event.target instanceof Element) || !event.target.closest("#mochi-ask")) return;
  event.preventDefault();
  /** @type {HTMLElement | null} */
  const generate = document.querySelector("#mochi-generate");
  generate?.click();
}
