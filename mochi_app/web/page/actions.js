// @ts-check
// The buttons that make sense for a job in its present state.

import { button, h, icon, setText } from "./dom.js";
import { ended, failed, fileUrl } from "./jobs.js";

/** @typedef {import("./jobs.js").Job} Job */
/** @typedef {import("./state.js").Store} Store */

/**
 * What the buttons ask of the panel.
 * @typedef {object} Commands
 * @property {number} enhanceSteps
 * @property {(job: Job) => void} enhance
 * @property {(job: Job) => void} star or not, if it is
 * @property {(job: Job) => void} retry
 * @property {(job: Job) => void} stop
 * @property {(job: Job) => void} remove
 */

/**
 * @param {Job} job
 * @param {Store} store
 * @param {Commands} commands
 * @returns {HTMLElement[]}
 */
export function actions(job, store, commands) {
  return ended(job) ? actionsAfter(job, store, commands) : actionsBefore(job, store, commands);
}

/**
 * Of a job that waits or runs.
 * @param {Job} job
 * @param {Store} store
 * @param {Commands} commands
 */
function actionsBefore(job, store, commands) {
  const mine = store.mine(job);
  const title = mine ? undefined : store.notMine(job);
  /** @type {HTMLElement[]} */
  const list = [];
  if (job.held) list.push(retry(job, commands, { title, disabled: !mine }));
  const label = job.cancel_requested ? "Stopping" : "Stop";
  const disabled = job.cancel_requested || !mine;
  const stop = () => commands.stop(job);
  list.push(button("stop", label, stop, { icon: "stop", title, disabled }), link(job));
  return list;
}

/**
 * Of a job that has ended.
 * @param {Job} job
 * @param {Store} store
 * @param {Commands} commands
 */
function actionsAfter(job, store, commands) {
  const list = job.status === "COMPLETED" ? watching(job, store, commands) : [retry(job, commands)];
  const reuse = () => store.emit("reuse", job);
  const what = "Put its prompt, seed and settings into the form";
  list.push(button("reuse", "Use again", reuse, { icon: "reuse", title: what }), link(job));
  const mine = store.mine(job);
  const title = mine ? undefined : store.notMine(job);
  const remove = () => commands.remove(job);
  list.push(button("delete", "Delete", remove, { icon: "trash", title, disabled: !mine }));
  return list;
}

/**
 * What one does with a video.
 * @param {Job} job
 * @param {Store} store
 * @param {Commands} commands
 */
function watching(job, store, commands) {
  /** @type {HTMLElement[]} */
  const list = [];
  const { enhance } = store.shown;
  if (!job.enhanced && (!enhance || failed(enhance))) {
    const title = `The same video with ${commands.enhanceSteps} steps`;
    const ask = () => commands.enhance(job);
    list.push(
      button("enhance", "Enhance", ask, { icon: "sparkle", className: "m-primary", title }),
    );
  }
  const className = job.starred ? "m-starred" : "";
  const star = () => commands.star(job);
  list.push(button("star", job.starred ? "Unstar" : "Star", star, { icon: "star", className }));
  if (job.video_url) {
    const href = `${fileUrl(job.video_url)}?download=true`;
    const download = { className: "m-button", href, download: "", "data-action": "download" };
    list.push(h("a", download, icon("download"), h("span", { textContent: "Download" })));
  }
  return list;
}

/**
 * @param {Job} job
 * @param {Commands} commands
 * @param {import("./dom.js").ButtonOptions} [options]
 */
function retry(job, commands, options = {}) {
  const again = () => commands.retry(job);
  return button("retry", "Try again", again, { icon: "reuse", className: "m-primary", ...options });
}

/** @param {Job} job */
function link(job) {
  const copy = (/** @type {HTMLElement} */ element) => copyLink(job.id, element);
  return button("link", "Copy link", copy, { icon: "link" });
}

/**
 * @param {string} jobId
 * @param {HTMLElement} element its last child bears the label
 */
async function copyLink(jobId, element) {
  const url = new URL(location.href);
  url.searchParams.set("job", jobId);
  const label = /** @type {HTMLElement} */ (element.lastChild);
  try {
    await navigator.clipboard.writeText(url.href);
    setText(label, "Copied");
  } catch {
    window.prompt("The link to this video:", url.href); // no clipboard without https
  }
  setTimeout(() => setText(label, "Copy link"), 2000);
}
