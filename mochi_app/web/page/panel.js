// @ts-check
// The panel: the selected job, alone or beside its preview or enhance.

import { button, h, icon, setText } from "./dom.js";
import { ended, kindName, statusName } from "./jobs.js";
import { Refusal, server } from "./server.js";
import { Tile } from "./tile.js";

/** @typedef {import("./jobs.js").Job} Job */
/** @typedef {import("./state.js").Store} Store */

const SYNC_SLACK = 0.08; // seconds by which two videos may differ
const IN_TRASH =
  "This video is in the trash. The history shows it under “Trash”, where it can be restored.";
const NOT_HERE = "This video is not here. It may have been deleted, or the link is incomplete.";

export class Panel {
  /**
   * @param {HTMLElement} element
   * @param {Store} store
   * @param {{enhance_steps: number, details: import("./tile.js").Detail[]}} props
   */
  constructor(element, store, props) {
    this.store = store;
    this.props = props;
    /** @type {Map<string, Tile>} */
    this.tiles = new Map();
    this.paired = "";
    /** @type {(() => void) | null} */
    this.unpair = null;
    /** Id of a job that is being deleted here. @type {string | null} */
    this.leaving = null;
    this.commands = this.makeCommands();
    this.prompt = h("p", { className: "m-prompt", dir: "auto", id: "mochi-prompt" });
    this.problem = h("p", { className: "m-problem", role: "alert" });
    this.undo = h("div", { className: "m-undo" });
    const hint = "Describe it, press Generate, and watch it form.";
    this.empty = h(
      "div",
      { className: "m-empty" },
      icon("film"),
      h("p", { textContent: "Your video appears here." }),
      h("p", { className: "m-subdued", textContent: hint }),
    );
    this.grid = h("div", { className: "m-tiles" });
    this.element = h(
      "section",
      { className: "m-panel", tabIndex: -1, "aria-label": "Selected video" },
      this.problem,
      this.undo,
      this.prompt,
      this.grid,
      this.empty,
    );
    element.replaceChildren(this.element);
  }

  /** @returns {import("./actions.js").Commands} */
  makeCommands() {
    const { store } = this;
    return {
      enhanceSteps: this.props.enhance_steps,
      enhance: (job) => this.run(() => this.enhance(job.id)),
      star: (job) => this.run(async () => store.take(await server.star_job(job.id, !job.starred))),
      retry: (job) => this.run(() => this.retry(job)),
      stop: (job) =>
        this.run(async () => {
          const stopping = await server.cancel_job(job.id);
          store.take({ ...store.live.jobs.get(job.id), ...stopping }); // with its picture
        }),
      remove: (job) => this.run(() => this.remove(job)),
    };
  }

  /**
   * Run what a button asks for; a failure is shown in the panel.
   * @param {() => Promise<unknown>} action
   */
  async run(action) {
    try {
      this.store.shown.problem = "";
      await action();
    } catch (error) {
      this.store.shown.problem = /** @type {Error} */ (error).message;
    }
    this.render();
  }

  /**
   * Show a job by its id; what is known of it already is shown at once.
   * @param {string | null} jobId
   * @param {Job | null} [known]
   */
  select(jobId, known = null) {
    const { shown } = this.store;
    Object.assign(shown, { jobId, preview: null, enhance: null, deleted: null, problem: "" });
    if (known) this.store.take(known);
    const url = new URL(location.href);
    if (jobId) url.searchParams.set("job", jobId);
    else url.searchParams.delete("job");
    history.replaceState(history.state, "", url);
    this.render();
    this.store.emit("selected");
    return this.reload();
  }

  /** Bring into view, unless most of it is there already. */
  reveal() {
    const { top } = this.element.getBoundingClientRect();
    if (top >= 0 && top < window.innerHeight / 2) return;
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.element.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
  }

  focus() {
    this.element.focus({ preventScroll: true });
  }

  /** Ask for the selected job and what belongs to it. */
  async reload() {
    const { shown, live } = this.store;
    const jobId = shown.jobId;
    if (!jobId) return;
    shown.listed = live.head?.listed;
    try {
      const lineage = await server.lineage(jobId);
      if (shown.jobId !== jobId || shown.deleted) return;
      Object.assign(shown, lineage, { problem: "" });
      for (const job of live.jobs.values()) this.store.take(job);
    } catch (error) {
      if (shown.jobId !== jobId) return;
      const { message } = /** @type {Error} */ (error);
      shown.problem = message;
      if (error instanceof Refusal) {
        shown.problem = message.includes("is in the trash") ? IN_TRASH : NOT_HERE;
        Object.assign(shown, { preview: null, enhance: null });
      }
    }
    this.render();
  }

  /** Ask again when somebody may have asked for an enhance of what is shown. */
  renew() {
    if (this.store.enhanceAwaited()) this.reload();
  }

  /**
   * Show what has changed.
   * @param {Job[]} changed
   */
  follow(changed) {
    const { store } = this;
    if (!store.shown.jobId) return;
    const before = store.current()?.status;
    for (const job of changed) {
      if (!job.gone) store.take(job);
      else if (job.id !== store.shown.deleted?.id && job.id !== this.leaving) this.reload();
    }
    const job = store.current();
    if (job && before && job.status !== before) {
      store.emit("announce", `${kindName(job)}: ${statusName(job)}`);
    }
    this.render();
  }

  /** Let times run on. */
  tick() {
    for (const tile of this.tiles.values()) if (!ended(tile.job)) tile.tick();
  }

  render() {
    const { shown } = this.store;
    const jobs = this.store.inPanel();
    setText(this.prompt, jobs[0]?.prompt ?? "");
    this.prompt.hidden = !jobs.length;
    setText(this.problem, shown.problem);
    this.problem.hidden = !shown.problem;
    this.empty.hidden = jobs.length > 0 || Boolean(shown.problem) || Boolean(shown.deleted);
    this.renderUndo();
    this.renderTiles(jobs);
    this.pair(jobs);
    this.showTitle();
    this.store.emit("jobs");
  }

  /** @param {Job[]} jobs */
  renderTiles(jobs) {
    for (const [jobId, tile] of this.tiles) {
      if (jobs.some((job) => job.id === jobId)) continue;
      tile.element.remove();
      this.tiles.delete(jobId);
    }
    for (const job of jobs) {
      const tile =
        this.tiles.get(job.id) ?? new Tile(job, this.store, this.commands, this.props.details);
      this.tiles.set(job.id, tile);
      tile.update(job);
      if (!tile.element.isConnected) {
        if (job.enhanced) this.grid.append(tile.element);
        else this.grid.prepend(tile.element);
      }
    }
    this.grid.dataset.count = String(jobs.length);
  }

  /** @param {Job[]} jobs */
  pair(jobs) {
    const shown = jobs.filter((job) => job.video_url);
    const [first, second] = shown.map((job) => this.tiles.get(job.id)?.video);
    const key = shown.length === 2 ? jobs.map((job) => job.id).join() : "";
    if (key === this.paired) return;
    this.unpair?.();
    this.paired = key;
    this.unpair = key && first && second ? playTogether(first, second) : null;
  }

  renderUndo() {
    const { deleted: job } = this.store.shown;
    this.undo.hidden = !job;
    if (!job || this.undo.dataset.job === job.id) return;
    this.undo.dataset.job = job.id;
    const restore = () => this.run(() => this.restore(job));
    const undo = button("undo", "Undo", restore, { icon: "undo" });
    const text = `${kindName(job)} moved to the trash.`;
    this.undo.replaceChildren(h("span", { textContent: text }), undo);
    this.undo.hidden = false;
    undo.focus();
    this.store.emit("announce", text);
  }

  showTitle() {
    const job = this.store.current();
    const running = job?.status === "PROCESSING" && job.step > 0;
    const title = running ? `${job.step}/${job.steps} · Mochi` : "Mochi";
    if (document.title !== title) document.title = title;
  }

  /** @param {string} jobId */
  async enhance(jobId) {
    this.store.take(await server.enhance_job(jobId));
    this.store.emit("changed");
  }

  /**
   * A held job goes on; one that has failed or was stopped is made anew.
   * @param {Job} job
   */
  async retry(job) {
    if (!ended(job)) {
      this.store.take(await server.retry_job(job.id));
    } else if (job.enhanced) {
      const enhance = await server.enhance_job(job.parent_id);
      if (this.store.shown.jobId === job.id) await this.select(enhance.id, enhance);
      else this.store.take(enhance);
    } else {
      const again = await server.retry_job(job.id);
      this.store.emit("changed");
      await this.select(again.id, again);
    }
  }

  /** @param {Job} job */
  async remove(job) {
    const { shown } = this.store;
    this.leaving = job.id; // the stream may tell so before the answer does
    try {
      await server.delete_job(job.id);
      shown.deleted = job;
    } finally {
      this.leaving = null;
    }
    if (job.enhanced) shown.enhance = null;
    else shown.preview = null;
    this.store.emit("changed");
  }

  /** @param {Job} job */
  async restore(job) {
    const restored = await server.restore_job(job.id);
    this.store.shown.deleted = null;
    delete this.undo.dataset.job;
    this.store.take(restored);
    this.store.emit("changed");
    this.focus();
  }
}

/**
 * Let two videos run as one: whatever is done to either is done to both.
 * @param {HTMLVideoElement} first
 * @param {HTMLVideoElement} second
 */
function playTogether(first, second) {
  const listeners = new AbortController();
  const options = { signal: listeners.signal };
  /** @type {(leader: HTMLVideoElement, follower: HTMLVideoElement) => () => void} */
  const follow = (leader, follower) => {
    const align = () => {
      if (Math.abs(leader.currentTime - follower.currentTime) > SYNC_SLACK) {
        follower.currentTime = leader.currentTime;
      }
    };
    /** @type {(event: string, action: () => void) => void} */
    const on = (event, action) => leader.addEventListener(event, action, options);
    on("play", () => follower.paused && follower.play().catch(() => {}));
    on("pause", () => !follower.paused && follower.pause());
    on("ratechange", () => {
      follower.playbackRate = leader.playbackRate;
    });
    on("seeked", () => leader.paused && align());
    return align;
  };
  const align = follow(first, second);
  follow(second, first);
  const running = () => !first.paused && !first.seeking && align();
  first.addEventListener("timeupdate", running, options);
  if (!first.paused) second.play().catch(() => {});
  align();
  return () => listeners.abort();
}
