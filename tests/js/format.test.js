import assert from "node:assert/strict";
import { test } from "node:test";
import { age, duration, plural, remaining } from "../../mochi_app/web/page/format.js";
import { describe, worst } from "../../mochi_app/web/page/header.js";
import { facts, stageText } from "../../mochi_app/web/page/tile.js";
import { job } from "./doubles.js";

test("a duration is rounded to what one can tell apart", () => {
  const told = [
    [-1, "0.0 s"],
    [0.04, "0.0 s"],
    [9.94, "9.9 s"],
    [9.95, "10 s"],
    [59.4, "59 s"],
    [59.5, "1 min 0 s"],
    [61, "1 min 1 s"],
    [3599, "59 min 59 s"],
    [3599.5, "1 h 0 min"],
    [7265, "2 h 1 min"],
  ];
  for (const [seconds, text] of told) assert.equal(duration(seconds), text);
});

test("what remains is at least a second, and whole seconds at first", () => {
  assert.equal(remaining(-5), "1 s");
  assert.equal(remaining(2.1), "3 s");
  assert.equal(remaining(9.4), "10 s");
  assert.equal(remaining(9.6), "9.6 s");
  assert.equal(remaining(100), "1 min 40 s");
});

test("an age is counted from now, and becomes a date after a day", (t) => {
  const now = Date.UTC(2026, 5, 15, 12);
  t.mock.timers.enable({ apis: ["Date"], now });
  const ago = (seconds) => age(now / 1000 - seconds);
  assert.equal(ago(59), "just now");
  assert.equal(ago(60), "1 min ago");
  assert.equal(ago(3599), "59 min ago");
  assert.equal(ago(3600), "1 h ago");
  assert.equal(ago(86399), "23 h ago");
  assert.equal(ago(5 * 86400), new Date(Date.UTC(2026, 5, 10, 12)).toLocaleDateString());
});

test("one is not many", () => {
  assert.equal(plural(1, "job", "jobs"), "1 job");
  assert.equal(plural(0, "job", "jobs"), "0 jobs");
});

const slot = (changes) => ({
  slot: 0,
  state: "ready",
  detail: "",
  job_id: null,
  retry_at: null,
  ...changes,
});

test("slots are told of together, and those in trouble by their number", () => {
  assert.equal(describe([slot({})], 0, 0), "Ready");
  assert.equal(describe([slot({ state: "busy" })], 0, 0), "Busy");
  const two = [slot({ state: "busy" }), slot({ slot: 1, state: "broken", detail: "no memory" })];
  assert.equal(describe(two, 0, 0), "Busy 1 of 2 · slot 1 broken: no memory");
  assert.equal(worst(two), "trouble");
  assert.equal(worst([slot({ state: "loading" }), slot({})]), "loading");
  assert.equal(worst([slot({ state: "busy" }), slot({})]), "ready");
});

test("what a slot counts goes on between two events", () => {
  const loading = slot({ state: "loading", detail: "loading the model, 12 s" });
  assert.equal(describe([loading], 103.2, 100), "Loading the model, 15 s");
  const restarting = slot({ state: "restarting", retry_at: 130 });
  assert.equal(describe([restarting], 100, 90), "Restarting, again in 30 s");
  assert.equal(describe([restarting], 131, 90), "Restarting");
});

test("a stage says what is waited for, or done", () => {
  const running = { status: "PROCESSING", stage: "denoise", step: 3 };
  const told = [
    [{ position: 2 }, "Place 2 in the queue"],
    [{}, "Waiting for a slot"],
    [{ held: "two slots died of it" }, ""],
    [{ waits_for: "a start" }, "Waiting: a start"],
    [{ waits_for: "the disk has 1 GiB" }, "Waiting for room: the disk has 1 GiB"],
    [running, "Denoising · step 3 of 8"],
    [{ ...running, cancel_requested: true }, "Stopping after this step"],
    [
      { status: "PROCESSING", stage: "decode", tile: 1, tiles: 4 },
      "Decoding the frames · tile 1 of 4",
    ],
    [{ status: "PROCESSING", stage: "decode", tile: 0, tiles: 1 }, "Decoding the frames"],
  ];
  for (const [changes, text] of told) assert.equal(stageText(job(changes)), text);
});

const DETAILS = [
  { name: "seed", label: "Seed", usual: null },
  { name: "negative_prompt", label: "Negative prompt", usual: "" },
  { name: "schedule", label: "Schedule", usual: "linear_quadratic" },
];

test("facts leave out what is as always", () => {
  const names = (changes, login) => facts(job(changes), login, DETAILS).map(([name]) => name);
  assert.deepEqual(names({}, true), ["Seed", "Size", "Length"]);
  const all = {
    status: "COMPLETED",
    seconds: { denoise: 3, decode: 1 },
    resumed_step: 4,
    schedule: "fast",
    lora: "noir",
    negative_prompt: "rain",
    owner: "ann",
  };
  const more = ["Took", "Resumed", "Negative prompt", "Schedule", "LoRA", "By"];
  assert.deepEqual(names(all, true).slice(3), more);
  const told = facts(job(all), true, DETAILS);
  assert.deepEqual(told[3], ["Took", "4.0 s"]);
  assert.deepEqual(told[5], ["Negative prompt", "rain"]);
  assert.ok(!names(all, false).includes("By"));
});
