// @ts-check
// One job in the history.

import { button, h, icon, setText } from "./dom.js";
import { age } from "./format.js";
import { ended, fileUrl, statusName } from "./jobs.js";

/** @typedef {import("./jobs.js").Job} Job */
/** @typedef {import("./state.js").Store} Store */

export class Card {
  /**
   * @param {Job} job
   * @param {Store} store
   * @param {(job: Job) => unknown} restore
   */
  constructor(job, store, restore) {
    this.job = job;
    this.store = store;
    this.restore = restore;
    const poster = { className: "m-poster", loading: "lazy", decoding: "async", alt: "" };
    this.image = h("img", poster);
    this.placeholder = h("span", { className: "m-placeholder" });
    this.badges = h("span", { className: "m-badges" });
    this.badgeKey = "";
    this.prompt = h("span", { className: "m-card-prompt", dir: "auto" });
    this.when = h("span", { className: "m-card-when" });
    this.link = h(
      "a",
      { className: "m-card-link", href: `?job=${encodeURIComponent(job.id)}` },
      h("span", { className: "m-card-media" }, this.image, this.placeholder, this.badges),
      this.prompt,
      this.when,
    );
    this.link.onclick = (event) => this.open(event);
    this.element = h("li", { className: "m-card" }, this.link);
    this.element.dataset.job = job.id;
    if (job.deleted_at !== null) this.offerRestore(job);
    this.update(job);
  }

  /** @param {MouseEvent} event */
  open(event) {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a tab of its own
    event.preventDefault();
    if (this.job.deleted_at === null) this.store.emit("opened", this.job);
  }

  /** @param {Job} job */
  update(job) {
    this.job = job;
    const source = job.poster_url ? fileUrl(job.poster_url) : !ended(job) && job.image;
    this.image.hidden = !source;
    if (source && this.image.getAttribute("src") !== source) this.image.src = source;
    this.placeholder.hidden = Boolean(job.poster_url);
    setText(this.placeholder, describe(job));
    this.element.dataset.status = job.status.toLowerCase();
    setText(this.prompt, job.prompt);
    this.prompt.title = job.prompt;
    const by = this.store.me.login && job.owner ? `${job.owner} · ` : "";
    setText(this.when, by + age(job.submitted_at));
    const badges = badgesOf(job);
    if (this.badgeKey !== badges.join()) {
      this.badgeKey = badges.join();
      this.badges.replaceChildren(...badges.map(([name, text]) => badge(name, text)));
    }
  }

  /** @param {Job} job it is in the trash */
  offerRestore(job) {
    this.link.removeAttribute("href");
    const restore = button("restore", "Restore", () => this.restore(job), { icon: "undo" });
    const mine = this.store.mine(job);
    restore.setAttribute("aria-label", `Restore: ${job.prompt}`);
    restore.disabled = !mine;
    restore.title = mine ? "" : this.store.notMine(job);
    this.element.append(restore);
  }

  /** @param {boolean} selected whether it is in the panel */
  mark(selected) {
    if (selected && this.job.deleted_at === null) this.link.setAttribute("aria-current", "true");
    else this.link.removeAttribute("aria-current");
  }
}

/** @param {Job} job */
function describe(job) {
  if (job.deleted_at !== null) return "In the trash";
  if (job.status === "PROCESSING" && job.step > 0) return `Step ${job.step} of ${job.steps}`;
  if (job.status === "PENDING" && job.position) return `Place ${job.position} in the queue`;
  return statusName(job);
}

/** @param {Job} job */
function badgesOf(job) {
  const texts = [["steps", `${job.num_inference_steps} steps`]];
  if (job.enhanced) texts.unshift(["enhanced", "Enhanced"]);
  if (job.evicted_at !== null) texts.push(["evicted", "Video removed"]);
  if (job.video_missing) texts.push(["evicted", "Video missing"]);
  if (job.starred) texts.push(["star", "Starred"]);
  return texts;
}

/**
 * @param {string} name
 * @param {string} text
 */
function badge(name, text) {
  const element = h("span", { className: `m-chip m-chip-${name}` });
  if (name === "star") {
    element.append(icon("star"), h("span", { className: "m-hidden", textContent: text }));
  } else element.append(text);
  return element;
}
