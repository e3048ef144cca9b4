// @ts-check
// The history: everybody's jobs, page by page, searched and filtered.

import { Card } from "./card.js";
import { button, h, setText } from "./dom.js";
import { plural } from "./format.js";
import { server } from "./server.js";

/** @typedef {import("./jobs.js").Job} Job */
/** @typedef {import("./state.js").Store} Store */

const PAGE_SIZE = 24;
const SEARCH_PAUSE = 250; // ms after the last key before a search is asked
const REFRESH_PAUSE = 400; // ms that changes are gathered before the history is asked again
const REFRESH_LEAST = 5000; // ms between two such questions, when others ask for one job after another

/** Names, as `ui.py` has them, and what the page calls them. */
export const FILTERS = [
  ["all", "Everything"],
  ["running", "Running"],
  ["waiting", "Waiting"],
  ["held", "Held"],
  ["completed", "Completed"],
  ["failed", "Failed"],
  ["stopped", "Stopped"],
  ["starred", "Starred"],
  ["previews", "Previews"],
  ["enhanced", "Enhanced"],
  ["trash", "Trash"],
];
const UNMARKED = ["all", "previews", "enhanced"]; // filters that no status and no star moves

export class Gallery {
  /**
   * @param {HTMLElement} element
   * @param {Store} store
   */
  constructor(element, store) {
    this.store = store;
    this.filter = "all";
    this.query = "";
    this.page = 1;
    this.total = 0;
    /** @type {Map<string, Card>} */
    this.cards = new Map();
    this.listed = 0; // as `/events` counts: when it moves, jobs have come or gone
    this.marked = 0; // likewise: a status or a star has changed
    this.asked = 0;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.timer = undefined;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.renewing = undefined;
    this.renewedAt = -Infinity;
    this.search = h("input", {
      type: "search",
      className: "m-input",
      id: "mochi-search",
      placeholder: "Search prompts",
      maxLength: 200,
      autocomplete: "off",
      "aria-label": "Search prompts",
    });
    this.search.oninput = () => this.later(SEARCH_PAUSE, { query: this.search.value, page: 1 });
    const select = { className: "m-input", id: "mochi-filter", "aria-label": "Show" };
    this.select = h("select", select);
    this.select.append(
      ...FILTERS.map(([value, text]) => h("option", { value, textContent: text })),
    );
    this.select.onchange = () => this.later(0, { filter: this.select.value, page: 1 });
    const confirm = () => this.confirm();
    this.emptyTrash = button("empty-trash", "Empty trash", confirm, { icon: "trash" });
    this.count = h("p", { className: "m-total", role: "status" });
    this.list = h("ul", { className: "m-cards", "aria-labelledby": "mochi-history" });
    this.none = h("p", { className: "m-none m-subdued" });
    this.problem = h("p", { className: "m-problem", role: "alert", hidden: true });
    /** @type {(by: number) => () => void} */
    const turn = (by) => () => this.later(0, { page: this.page + by }, true);
    this.previous = button("previous", "Newer", turn(-1));
    this.next = button("next", "Older", turn(1));
    this.where = h("span", { className: "m-where" });
    this.pages = h("nav", { className: "m-pages", "aria-label": "Pages of the history" });
    this.pages.append(this.previous, this.where, this.next);
    this.question = h("p", { id: "mochi-question" });
    /** @type {HTMLDialogElement} */
    this.dialog = this.makeDialog();
    this.element = h(
      "section",
      { className: "m-gallery" },
      h(
        "div",
        { className: "m-gallery-head" },
        h("h2", { textContent: "History", id: "mochi-history" }),
        this.count,
        h("div", { className: "m-tools" }, this.emptyTrash, this.search, this.select),
      ),
      this.problem,
      this.list,
      this.none,
      this.pages,
    );
    element.replaceChildren(this.element, this.dialog);
  }

  /** @returns {HTMLDialogElement} */
  makeDialog() {
    const close = () => this.dialog.close();
    const empty = () => {
      close();
      this.run(() => server.empty_trash());
    };
    return h(
      "dialog",
      { className: "m-dialog", "aria-labelledby": "mochi-question" },
      this.question,
      h(
        "div",
        { className: "m-actions" },
        button("keep", "Keep them", close),
        button("empty", "Delete for good", empty, { className: "m-danger" }),
      ),
    );
  }

  /** The whole trash is meant, whatever is searched for. */
  confirm() {
    return this.run(async () => {
      const question = { filter: "trash", query: "", page: 1, page_size: 1 };
      const what = plural((await server.list_jobs(question)).total, "job", "jobs");
      setText(this.question, `Delete ${what} in the trash for good? This cannot be undone.`);
      this.dialog.showModal();
    });
  }

  /**
   * Ask again after a pause, in which further changes join.
   * @param {number} pause in ms
   * @param {{filter?: string, query?: string, page?: number}} [changes]
   * @param {boolean} [scroll] to the history's begin
   */
  later(pause, changes = {}, scroll = false) {
    Object.assign(this, changes);
    clearTimeout(this.timer);
    this.timer = setTimeout(async () => {
      await this.refresh();
      if (scroll) this.element.scrollIntoView({ block: "start" });
    }, pause);
  }

  /** Ask again, with what else changes at this moment. */
  soon() {
    this.later(REFRESH_PAUSE);
  }

  /** @param {() => Promise<unknown>} action */
  async run(action) {
    try {
      await action();
      await this.refresh();
    } catch (error) {
      this.fail(error);
    }
  }

  /** @param {unknown} error */
  fail(error) {
    setText(this.problem, /** @type {Error} */ (error).message);
    this.problem.hidden = false;
  }

  /** Ask for the page of the history that is wanted. */
  async refresh() {
    const asked = ++this.asked;
    const { filter, query, page } = this;
    try {
      const found = await server.list_jobs({ filter, query, page, page_size: PAGE_SIZE });
      if (asked !== this.asked) return; // a later question is on its way
      const last = Math.max(1, Math.ceil(found.total / PAGE_SIZE));
      if (page > last) {
        this.later(0, { page: last });
        return;
      }
      this.problem.hidden = true;
      Object.assign(this, { total: found.total, listed: found.listed, marked: found.marked });
      this.render(found.jobs);
    } catch (error) {
      this.fail(error);
    }
  }

  /** @param {Job[]} jobs */
  render(jobs) {
    const { live } = this.store;
    const newest = jobs.map((job) => {
      return job.deleted_at === null ? (live.jobs.get(job.id) ?? job) : job;
    });
    /** @type {(job: Job) => Promise<void>} */
    const restore = (job) => this.run(() => server.restore_job(job.id));
    this.cards = reconcile(this.cards, newest, (job) => new Card(job, this.store, restore));
    this.store.listed = new Map(newest.map((job) => [job.id, job]));
    const elements = [...this.cards.values()].map((card) => card.element);
    if (!equal(elements, [...this.list.children])) this.list.replaceChildren(...elements);
    this.renderFrame();
    this.markSelected();
    this.store.emit("jobs");
  }

  renderFrame() {
    const { me } = this.store;
    const last = Math.max(1, Math.ceil(this.total / PAGE_SIZE));
    setText(this.count, plural(this.total, "job", "jobs"));
    setText(this.where, `Page ${this.page} of ${last}`);
    this.previous.disabled = this.page <= 1;
    this.next.disabled = this.page >= last;
    this.pages.hidden = last < 2;
    this.emptyTrash.hidden = this.filter !== "trash" || (me.login && !me.admin);
    this.emptyTrash.disabled = this.total === 0 && !this.query;
    this.none.hidden = this.total > 0;
    setText(this.none, this.noneText());
  }

  noneText() {
    if (this.query.trim()) return "No prompt has these words.";
    if (this.filter === "trash") return "The trash is empty.";
    if (this.filter !== "all") return "Nothing here yet.";
    return "Everybody's videos will be kept here.";
  }

  /** Mark what is in the panel. */
  markSelected() {
    const { jobId, preview, enhance } = this.store.shown;
    const chosen = [jobId, preview?.id, enhance?.id];
    for (const [id, card] of this.cards) card.mark(chosen.includes(id));
  }

  /**
   * Keep cards of live jobs fresh; ask again when the history has changed.
   * @param {Job[]} changed
   */
  follow(changed) {
    for (const job of changed) {
      const card = this.filter === "trash" || job.gone ? undefined : this.cards.get(job.id);
      if (!card) continue;
      this.store.listed.set(job.id, job);
      card.update(job);
    }
    if (!this.renewing && (this.outdated() || this.store.enhanceAwaited())) this.renew();
  }

  /** Whether the first page may list other jobs by now. Later ones and the trash stay as they are. */
  outdated() {
    const { head } = this.store.live;
    if (!head || this.page > 1 || this.filter === "trash") return false;
    const moved = !UNMARKED.includes(this.filter) && head.marked !== this.marked;
    return head.listed !== this.listed || moved;
  }

  renew() {
    const soonest = this.renewedAt + REFRESH_LEAST - performance.now();
    this.renewing = setTimeout(
      () => {
        this.renewing = undefined;
        this.renewedAt = performance.now();
        this.store.emit("renew");
        if (this.outdated()) this.refresh();
      },
      Math.max(REFRESH_PAUSE, soonest),
    );
  }
}

/**
 * Cards for these jobs, in their order: those that are there already, updated, and new ones. A card
 * of a job that went to the trash, or came back, is another one.
 * @template {{job: Job, update: (job: Job) => void}} Kept
 * @param {Map<string, Kept>} cards by the job's id
 * @param {Job[]} jobs
 * @param {(job: Job) => Kept} make
 */
export function reconcile(cards, jobs, make) {
  /** @type {Map<string, Kept>} */
  const fresh = new Map();
  for (const job of jobs) {
    const card = cards.get(job.id);
    if (card && (card.job.deleted_at === null) === (job.deleted_at === null)) {
      card.update(job);
      fresh.set(job.id, card);
    } else fresh.set(job.id, make(job));
  }
  return fresh;
}

/**
 * Whether both have the same things in the same order.
 * @param {unknown[]} one
 * @param {unknown[]} other
 */
export function equal(one, other) {
  return one.length === other.length && one.every((item, index) => item === other[index]);
}
