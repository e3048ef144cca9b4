// @ts-check
// One job in the panel: its video or the way there, its buttons, its facts.

import { actions } from "./actions.js";
import { h, note, setText } from "./dom.js";
import { duration, remaining } from "./format.js";
import { ended, fileUrl, kindName, statusName } from "./jobs.js";

/** @typedef {import("./jobs.js").Job} Job */
/** @typedef {import("./state.js").Store} Store */
/** @typedef {import("./actions.js").Commands} Commands */

/** @type {Record<string, string>} */
const STAGE_NAMES = {
  starting: "Starting",
  text: "Reading the prompt",
  denoise: "Denoising",
  decode: "Decoding the frames",
  encode: "Writing the video",
};

/**
 * A parameter that a job's facts name, always or when it is not as usual (`details` in `ui.py`).
 * @typedef {{name: string, label: string, usual: unknown}} Detail
 */

/** The video element lives as long as the tile shows the same video. */
export class Tile {
  /**
   * @param {Job} job
   * @param {Store} store
   * @param {Commands} commands
   * @param {Detail[]} details
   */
  constructor(job, store, commands, details) {
    this.job = job;
    this.store = store;
    this.commands = commands;
    this.details = details;
    /** @type {Record<string, string>} */
    this.keys = {};
    this.name = h("h3", { className: "m-tile-name" });
    this.status = h("span", { className: "m-badge" });
    this.media = h("div", { className: "m-media" });
    /** @type {HTMLVideoElement | null} */
    this.video = null;
    this.bar = h("progress", { className: "m-bar" });
    this.stage = h("span", { className: "m-stage" });
    this.eta = h("span", { className: "m-eta" });
    this.progress = h("div", { className: "m-progress" }, this.bar, this.stage, this.eta);
    this.error = h("p", { className: "m-error", dir: "auto" });
    this.facts = h("dl", { className: "m-facts" });
    this.actions = h("div", { className: "m-actions" });
    this.element = h(
      "article",
      { className: "m-tile" },
      h("div", { className: "m-tile-head" }, this.name, this.status),
      this.media,
      this.progress,
      this.error,
      this.actions,
      this.facts,
    );
    this.element.dataset.job = job.id;
  }

  /** @param {Job} job */
  update(job) {
    this.job = job;
    const name = kindName(job);
    this.element.setAttribute("aria-label", `${name}, ${job.num_inference_steps} steps`);
    setText(this.name, `${name} · ${job.num_inference_steps} steps`);
    setText(this.status, statusName(job));
    this.element.dataset.status = job.held ? "held" : job.status.toLowerCase();
    this.status.hidden = job.status === "COMPLETED";
    this.showMedia(job);
    this.showProgress(job);
    const again = job.status === "PENDING" && (job.held || job.error);
    this.error.hidden = job.status !== "FAILED" && !again;
    setText(this.error, errorText(job));
    const told = facts(job, this.store.me.login, this.details);
    this.once("facts", JSON.stringify(told), () => this.showFacts(told));
    this.once("actions", this.actionsKey(job), () => this.showActions(job));
  }

  /**
   * Do something only when what it depends on has changed.
   * @param {string} name
   * @param {string} key
   * @param {() => void} action
   */
  once(name, key, action) {
    if (this.keys[name] === key) return;
    this.keys[name] = key;
    action();
  }

  /** @param {Job} job */
  actionsKey(job) {
    const { shown, me } = this.store;
    const enhance = job.enhanced ? "" : (shown.enhance?.status ?? "none");
    const own = [job.status, job.held, job.starred, job.cancel_requested, job.video_url];
    return [...own, enhance, me.name].join();
  }

  /** @param {Job} job */
  showActions(job) {
    const active = document.activeElement;
    const focused =
      active instanceof HTMLElement && this.actions.contains(active) && active.dataset.action;
    this.actions.replaceChildren(...actions(job, this.store, this.commands));
    if (!focused) return;
    /** @type {HTMLElement | null} */
    const same = this.actions.querySelector(`[data-action="${focused}"]`);
    same?.focus();
  }

  /** @param {string[][]} told */
  showFacts(told) {
    const pairs = told.map(([name, value]) => {
      const text = h("dd", { textContent: value, dir: "auto" });
      return h("div", {}, h("dt", { textContent: name }), text);
    });
    this.facts.replaceChildren(...pairs);
  }

  /** @param {Job} job */
  showProgress(job) {
    this.progress.hidden = ended(job);
    if (ended(job)) return;
    const denoising = job.status === "PROCESSING" && job.step > 0;
    this.bar.max = job.steps;
    if (denoising) this.bar.value = job.step;
    else this.bar.removeAttribute("value");
    this.bar.hidden = job.status !== "PROCESSING";
    this.bar.setAttribute("aria-label", "Steps done");
    setText(this.stage, stageText(job));
    this.tick();
  }

  /** Let the time that is left run down. */
  tick() {
    const { eta_seconds: left, as_of: asOf, cancel_requested: stopping } = this.job;
    const known = left !== null && left !== undefined && !stopping;
    const age = asOf === undefined ? 0 : this.store.serverNow() - asOf;
    setText(this.eta, known ? `about ${remaining(left - age)} left` : "");
  }

  /** @param {Job} job */
  showMedia(job) {
    this.media.style.aspectRatio = `${job.width} / ${job.height}`;
    const { video_url: video, poster_url: poster, image } = job;
    if (video) {
      this.once("media", `video ${video}`, () => this.showVideo(job, video));
    } else if (image && !ended(job)) {
      this.showPicture(image);
    } else if (job.status === "COMPLETED" && poster) {
      const key = `poster ${poster} ${job.video_missing}`;
      this.once("media", key, () => this.showEvicted(job, poster));
    } else {
      const key = ended(job) || job.held ? `none ${job.status}` : "wait";
      this.once("media", key, () => this.showNone(job));
    }
  }

  /**
   * @param {Job} job
   * @param {string} path
   */
  showVideo(job, path) {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.video = h("video", {
      src: fileUrl(path),
      poster: job.poster_url ? fileUrl(job.poster_url) : "",
      controls: true,
      loop: true,
      muted: true,
      playsInline: true,
      autoplay: !still,
      "aria-label": `${kindName(job)} video: ${job.prompt}`,
    });
    this.video.onerror = () => this.media.replaceChildren(note("The video could not be played."));
    this.media.replaceChildren(this.video);
  }

  /**
   * The picture so far.
   * @param {string} image
   */
  showPicture(image) {
    this.once("media", "image", () => {
      this.picture = h("img", { className: "m-live", alt: "The picture so far" });
      this.media.replaceChildren(this.picture);
    });
    this.once("image", image, () => {
      if (this.picture) this.picture.src = image;
    });
  }

  /**
   * @param {Job} job
   * @param {string} path
   */
  showEvicted(job, path) {
    const poster = h("img", { src: fileUrl(path), alt: "First picture of the video" });
    const gone = job.video_missing
      ? "The video is gone from the server’s disk."
      : "The video was removed to make room.";
    const text = `${gone} “Use again” makes the same one.`;
    this.media.replaceChildren(poster, h("p", { className: "m-over", textContent: text }));
  }

  /** @param {Job} job */
  showNone(job) {
    const waiting = h("span", { className: "m-breath", "aria-hidden": "true" });
    if (job.held) this.media.replaceChildren(note("Held until somebody tries it again"));
    else this.media.replaceChildren(ended(job) ? note(noVideo(job)) : waiting);
  }
}

/** @param {Job} job */
function noVideo(job) {
  if (job.status === "FAILED") return "No video: the job failed";
  return job.status === "CANCELLED" ? "Stopped before its end" : "No video";
}

/** @param {Job} job */
function errorText(job) {
  if (job.held) return `Held: ${job.held}`;
  return (job.status === "PENDING" ? "Queued again: " : "") + (job.error ?? "");
}

/**
 * What a job waits for or does.
 * @param {Job} job
 */
export function stageText(job) {
  if (job.waits_for?.startsWith("the disk has ")) return `Waiting for room: ${job.waits_for}`;
  if (job.waits_for) return `Waiting: ${job.waits_for}`;
  if (job.status !== "PROCESSING") {
    if (job.held) return "";
    return job.position ? `Place ${job.position} in the queue` : "Waiting for a slot";
  }
  if (job.cancel_requested) return "Stopping after this step";
  const stage = STAGE_NAMES[job.stage] ?? job.stage ?? "Starting";
  if (job.stage === "denoise") return `${stage} · step ${job.step} of ${job.steps}`;
  const tiled = job.stage === "decode" && job.tiles > 1;
  return tiled ? `${stage} · tile ${job.tile} of ${job.tiles}` : stage;
}

/**
 * What a video was made with: names and values.
 * @param {Job} job
 * @param {boolean} login whether people have names
 * @param {Detail[]} details
 */
export function facts(job, login, details) {
  // Not the difference of two times: the server's clock may have been set in between.
  const took = Object.values(job.seconds).reduce((sum, seconds) => sum + seconds, 0);
  /** @type {Record<string, unknown>} */
  const values = { ...job };
  const always = details.filter(({ usual }) => usual === null);
  const changed = details.filter(({ name, usual }) => usual !== null && values[name] !== usual);
  /** @param {Detail} detail */
  const fact = ({ name, label }) => [label, String(values[name])];
  const list = [
    ...always.map(fact),
    ["Size", `${job.width} × ${job.height}`],
    ["Length", `${job.num_frames} frames, ${duration(job.num_frames / job.fps)}`],
  ];
  if (job.status === "COMPLETED" && took > 0) list.push(["Took", duration(took)]);
  if (job.resumed_step > 0) list.push(["Resumed", `after step ${job.resumed_step}`]);
  list.push(...changed.map(fact));
  if (job.lora) list.push(["LoRA", `${job.lora} × ${job.lora_scale}`]);
  if (login && job.owner) list.push(["By", job.owner]);
  return list;
}
