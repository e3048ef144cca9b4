// @ts-check
// What the page knows, and the events by which its parts hear of each other. The parts import this
// module and none of their own kind; `main.js` says who hears what.

import { ended, failed } from "./jobs.js";

/** @typedef {import("./jobs.js").Job} Job */

/**
 * @typedef {object} Slot
 * @property {number} slot
 * @property {string} state
 * @property {string} detail
 * @property {string | null} job_id
 * @property {number | null} retry_at on the stream's clock
 */

/**
 * What an event of `/events` tells (`events.py`). An entry of `jobs` has the fields that changed.
 * @typedef {object} StreamEvent
 * @property {number} now seconds on the stream's clock
 * @property {number} pending
 * @property {number} held
 * @property {number} processing
 * @property {number} listed grows when a job comes or goes
 * @property {number} marked grows when a status or a star changes
 * @property {Slot[]} [slots]
 * @property {(Partial<Job> & {id: string})[]} jobs
 * @property {Record<string, string>} [pictures] data URLs by job
 */

/**
 * What the store tells of, with what it tells.
 * @typedef {object} Events
 * @property {undefined} connection it was lost, or whether one is logged in has changed
 * @property {Job[]} heard these have changed, by the stream
 * @property {undefined} back the stream is there again after it was lost
 * @property {undefined} jobs other jobs may be on the page
 * @property {undefined} selected another job is shown, by its id
 * @property {undefined} changed the history was changed from this page
 * @property {undefined} renew what was asked for some time ago may be outdated
 * @property {Job} opened somebody wants to see this job
 * @property {Job} reuse somebody wants this job's values in the form
 * @property {Job} submitted the form made this job
 * @property {string} announce for screen readers
 * @property {{closed: boolean, told: string}} gate whether the server refuses what this page sends
 */

/**
 * Who looks at the page.
 * @typedef {object} Me
 * @property {string | null} name null until it is known
 * @property {boolean} admin
 * @property {boolean} login whether there is a login at all
 */

/**
 * What the panel shows.
 * @typedef {object} Shown
 * @property {string | null} jobId what `?job=` says
 * @property {Job | null} preview
 * @property {Job | null} enhance
 * @property {Job | null} deleted a job that was deleted from the panel, and can be undone
 * @property {string} problem
 * @property {number | undefined} listed as in `StreamEvent`, when this was asked for
 */

export class Store {
  constructor() {
    this.live = {
      /** The newest event: its counts and clock. @type {StreamEvent | null} */
      head: null,
      receivedAt: 0, // ms, as of `performance.now()`
      /** @type {Slot[]} */
      slots: [],
      slotsAt: 0, // seconds on the stream's clock
      /** By id: the newest views of the jobs that are named. @type {Map<string, Job>} */
      jobs: new Map(),
      /** @type {boolean | null} */
      connected: null,
      loggedOut: false,
    };
    /** @type {Me} */
    this.me = { name: null, admin: false, login: false };
    /** @type {Shown} */
    this.shown = {
      jobId: null,
      preview: null,
      enhance: null,
      deleted: null,
      problem: "",
      listed: undefined,
    };
    /** The page of the history, by id. @type {Map<string, Job>} */
    this.listed = new Map();
    /** @type {Map<keyof Events, ((detail: any) => void)[]>} */
    this.listeners = new Map();
  }

  /**
   * Listeners hear in the order in which they came.
   * @template {keyof Events} Name
   * @param {Name} name
   * @param {(detail: Events[Name]) => void} listener
   */
  on(name, listener) {
    this.listeners.set(name, [...(this.listeners.get(name) ?? []), listener]);
  }

  /**
   * @template {keyof Events} Name
   * @param {Name} name
   * @param {Events[Name] extends undefined ? [] : [Events[Name]]} detail
   */
  emit(name, ...detail) {
    for (const listener of this.listeners.get(name) ?? []) listener(detail[0]);
  }

  /** Seconds since the newest event, to let times run on between two of them. */
  sinceEvent() {
    return (performance.now() - this.live.receivedAt) / 1000;
  }

  /** Seconds on the clock by which the stream tells of times. */
  serverNow() {
    return (this.live.head?.now ?? 0) + this.sinceEvent();
  }

  /**
   * Whether a job is ours to stop and delete. The server decides; this only saves a refusal.
   * @param {Job} job
   */
  mine(job) {
    const { name, admin } = this.me;
    return name === null || admin || !job.owner || job.owner === name;
  }

  /**
   * Why it is not.
   * @param {Job} job
   */
  notMine(job) {
    if (this.me.login) return `Only ${job.owner} or an admin can do this`;
    return "Asked for in another browser";
  }

  /**
   * Take in an event; the jobs that have changed. One that is gone has no other field.
   * @param {StreamEvent} event
   * @returns {Job[]}
   */
  receive(event) {
    const { live } = this;
    Object.assign(live, { head: event, connected: true, loggedOut: false });
    live.receivedAt = performance.now();
    if (event.slots) Object.assign(live, { slots: event.slots, slotsAt: event.now });
    /** @type {Map<string, Job>} */
    const changed = new Map();
    /** @type {(id: string, news: Partial<Job>) => void} */
    const merge = (id, news) => {
      const known = changed.get(id) ?? live.jobs.get(id);
      changed.set(id, /** @type {Job} */ ({ ...known, ...news }));
    };
    for (const job of event.jobs) merge(job.id, job);
    for (const [id, image] of Object.entries(event.pictures ?? {})) merge(id, { image });
    for (const [id, job] of changed) {
      if (job.status !== "PROCESSING") job.image = null;
      if (job.gone) live.jobs.delete(id);
      else live.jobs.set(id, job);
    }
    return [...changed.values()];
  }

  /**
   * Take over a newer view of a job that is shown, or a new enhance of the preview shown.
   * @param {Job} job
   */
  take(job) {
    const { shown } = this;
    if (shown.deleted?.id === job.id) return;
    if (job.enhanced) {
      const ours = shown.jobId === job.id || shown.preview?.id === job.parent_id;
      if (ours && (!shown.enhance || shown.enhance.id <= job.id)) shown.enhance = job;
    } else if (shown.jobId === job.id || shown.enhance?.parent_id === job.id) {
      shown.preview = job;
    }
  }

  /** The job that is worth a word: the enhance when it is shown, else the preview. */
  current() {
    return this.shown.enhance ?? this.shown.preview;
  }

  /** The jobs in the panel. */
  inPanel() {
    return [this.shown.preview, this.shown.enhance].filter((job) => job !== null);
  }

  /** Whether somebody may have asked for an enhance of the preview that is shown. */
  enhanceAwaited() {
    const { preview, enhance, deleted, listed } = this.shown;
    const none = !enhance || failed(enhance);
    const awaited = preview?.status === "COMPLETED" && none && !deleted;
    return awaited && this.live.head?.listed !== listed;
  }

  /**
   * The jobs to hear of: those in the panel, and those of the history that may change, if they are
   * seen.
   * @param {boolean} hidden whether nobody sees the page
   */
  wanted(hidden) {
    const jobs = this.inPanel().filter((job) => job.id !== this.shown.deleted?.id);
    if (!hidden) {
      const cards = [...this.listed.values()];
      jobs.push(...cards.filter((job) => !ended(job) && job.deleted_at === null));
    }
    return jobs;
  }
}

export const store = new Store();
