// @ts-check
// What a job is to the page: its view, as the server tells it, and the words for it.

/**
 * @typedef {"CREATED" | "PENDING" | "PROCESSING" | "COMPLETED" | "FAILED" | "CANCELLED"} Status
 */

/**
 * A job's view, as `Studio.view` makes it. Times are Unix seconds.
 * @typedef {object} Job
 * @property {string} id
 * @property {Status} status
 * @property {string} prompt
 * @property {string} negative_prompt
 * @property {number} seed
 * @property {number} num_inference_steps
 * @property {number} guidance_scale
 * @property {number} height in pixels
 * @property {number} width in pixels
 * @property {number} num_frames
 * @property {number} fps
 * @property {string} schedule
 * @property {string | null} lora
 * @property {number} lora_scale
 * @property {string} owner
 * @property {string | null} parent_id the preview of an enhance
 * @property {boolean} enhanced
 * @property {boolean} starred
 * @property {number} submitted_at
 * @property {number | null} deleted_at
 * @property {number | null} evicted_at
 * @property {string | null} error
 * @property {string | null} held why it waits for a person
 * @property {string | null} waits_for why it does not begin, or why its video is not there
 * @property {boolean} cancel_requested
 * @property {string} stage
 * @property {number} step
 * @property {number} steps
 * @property {number} resumed_step
 * @property {number} tile
 * @property {number} tiles
 * @property {number | null} position in the queue, from 1
 * @property {number | null} eta_seconds
 * @property {Record<string, number>} seconds by stage
 * @property {boolean} video_missing
 * @property {string | null} video_url
 * @property {string | null} poster_url
 * @property {number} [as_of] when `eta_seconds` was true, on the stream's clock
 * @property {string | null} [image] the picture so far, a data URL
 * @property {boolean} [gone] it is in the trash or removed; then there is no other field but `id`
 */

/** @type {readonly Status[]} */
const ENDED = ["COMPLETED", "FAILED", "CANCELLED"];

/** @type {Record<Status, string>} */
const STATUS_NAMES = {
  CREATED: "Waiting",
  PENDING: "Waiting",
  PROCESSING: "Running",
  COMPLETED: "Completed",
  FAILED: "Failed",
  CANCELLED: "Stopped",
};

/** @param {Job} job */
export const ended = (job) => ENDED.includes(job.status);

/**
 * Whether it ended without a video.
 * @param {Job} job
 */
export const failed = (job) => job.status === "FAILED" || job.status === "CANCELLED";

/** @param {Job} job */
export const statusName = (job) => (job.held ? "Held" : STATUS_NAMES[job.status]);

/** @param {Job} job */
export const kindName = (job) => (job.enhanced ? "Enhanced" : "Preview");

/**
 * A file's address, relative: the app may live under a prefix.
 * @param {string} path
 */
export const fileUrl = (path) => `.${path}`;
