// @ts-check
// What the page asks of the server: the functions that Gradio offers to the parts (`Calls` in
// `ui.py`). A refusal, or a server that is away, becomes an Error to be shown.

import { store } from "./state.js";

/** @typedef {import("./jobs.js").Job} Job */
/** @typedef {import("./state.js").Me} Me */

/**
 * @typedef {object} Question a page of the history
 * @property {string} filter
 * @property {string} query
 * @property {number} page from 1
 * @property {number} page_size
 */

/**
 * @typedef {object} Listing
 * @property {Job[]} jobs
 * @property {number} total
 * @property {number} listed as in an event of the stream
 * @property {number} marked likewise
 */

/** @typedef {Record<string, (argument: unknown) => Promise<any>>} Functions */

const REFUSES = "The server refuses what this page sends. The reason is at the top of the page.";
const SILENT = "The server did not answer. Try again in a moment.";

/** An answer of the server's, in its words. */
export class Refusal extends Error {}

/** @type {Functions} */
let functions = {};

/**
 * Ask by way of these from now on.
 * @param {Functions} offered
 */
export function connect(offered) {
  functions = offered;
}

/**
 * @param {string} name
 * @param {unknown} argument
 */
async function ask(name, argument) {
  // Gradio answers with nothing when the server was not reached, or refused.
  const answer = await functions[name](argument).catch(() => null);
  if (!answer) throw new Error((await closed()) ? REFUSES : SILENT);
  if (answer.error !== undefined) throw new Refusal(answer.error);
  return answer.ok;
}

/** Whether the server refuses every call of this page, as behind a proxy that hides where it is. */
async function closed() {
  const answer = await fetch("./livez", { method: "POST" }).catch(() => null);
  const refuses = answer !== null && [403, 421].includes(answer.status);
  const told = refuses ? await answer.json().catch(() => null) : null;
  store.emit("gate", {
    closed: refuses,
    told: told?.detail ?? "A proxy in front of the server refuses what this page sends.",
  });
  return refuses;
}

export const server = {
  /** @returns {Promise<Me>} */
  whoami: () => ask("whoami", null),
  /**
   * The job with its preview or its newest enhance, whichever are there.
   * @param {string} jobId
   * @returns {Promise<{preview: Job | null, enhance: Job | null}>}
   */
  lineage: (jobId) => ask("lineage", jobId),
  /** @type {(question: Question) => Promise<Listing>} */
  list_jobs: (question) => ask("list_jobs", question),
  /** @type {(jobId: string | null) => Promise<Job>} */
  enhance_job: (jobId) => ask("enhance_job", jobId),
  /** @type {(jobId: string) => Promise<Job>} */
  retry_job: (jobId) => ask("retry_job", jobId),
  /** @type {(jobId: string) => Promise<Job>} */
  cancel_job: (jobId) => ask("cancel_job", jobId),
  /** @type {(jobId: string, starred: boolean) => Promise<Job>} */
  star_job: (jobId, starred) => ask("star_job", [jobId, starred]),
  /** @type {(jobId: string) => Promise<Job>} */
  delete_job: (jobId) => ask("delete_job", jobId),
  /** @type {(jobId: string) => Promise<Job>} */
  restore_job: (jobId) => ask("restore_job", jobId),
  /** @returns {Promise<number>} how many */
  empty_trash: () => ask("empty_trash", null),
};
