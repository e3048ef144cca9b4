// Jobs, and stand-ins for what the page's modules need of a browser.

/** A job's view with these fields changed. */
export function job(changes = {}) {
  return {
    id: "1",
    status: "PENDING",
    prompt: "a ring",
    negative_prompt: "",
    seed: 7,
    num_inference_steps: 8,
    guidance_scale: 3,
    height: 96,
    width: 64,
    num_frames: 31,
    fps: 12,
    schedule: "linear_quadratic",
    lora: null,
    lora_scale: 1,
    owner: "",
    parent_id: null,
    enhanced: false,
    starred: false,
    deleted_at: null,
    evicted_at: null,
    error: null,
    held: null,
    waits_for: null,
    cancel_requested: false,
    stage: "",
    step: 0,
    steps: 8,
    resumed_step: 0,
    seconds: {},
    ...changes,
  };
}

/** An event of the stream with these fields changed. */
export function event(changes = {}) {
  return {
    now: 10,
    pending: 0,
    held: 0,
    processing: 0,
    listed: 1,
    marked: 1,
    jobs: [],
    ...changes,
  };
}

/** Stands in for the browser's; `opened` has every one. */
export class FakeEventSource {
  static CONNECTING = 0;
  static opened = [];

  constructor(url) {
    this.url = url;
    this.readyState = 1;
    this.closed = false;
    FakeEventSource.opened.push(this);
  }

  static get newest() {
    return FakeEventSource.opened.at(-1);
  }

  close() {
    this.closed = true;
  }

  tell(changes) {
    this.onmessage({ data: JSON.stringify(event(changes)) });
  }

  fail(readyState = 2) {
    this.readyState = readyState;
    this.onerror();
  }
}
