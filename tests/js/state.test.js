import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import { Store } from "../../mochi_app/web/page/state.js";
import { event, job } from "./doubles.js";

let store;

beforeEach(() => {
  store = new Store();
});

test("listeners hear in the order in which they came, of what they asked for", () => {
  const heard = [];
  store.on("announce", (text) => heard.push(["first", text]));
  store.on("announce", (text) => heard.push(["second", text]));
  store.on("jobs", () => heard.push("jobs"));
  store.emit("announce", "hello");
  assert.deepEqual(heard, [
    ["first", "hello"],
    ["second", "hello"],
  ]);
});

test("an event's fields are merged into what is known of a job", () => {
  store.receive(event({ jobs: [job({ status: "PROCESSING" })] }));
  const [changed] = store.receive(
    event({ jobs: [{ id: "1", step: 5 }], pictures: { 1: "data:" } }),
  );
  assert.deepEqual(changed, job({ status: "PROCESSING", step: 5, image: "data:" }));
  assert.equal(store.live.jobs.get("1"), changed);
});

test("a picture ends with the run, and a job that is gone is forgotten", () => {
  store.receive(event({ jobs: [job({ status: "PROCESSING" })], pictures: { 1: "data:" } }));
  const [done] = store.receive(event({ jobs: [{ id: "1", status: "COMPLETED" }] }));
  assert.equal(done.image, null);
  const [gone] = store.receive(event({ jobs: [{ id: "1", gone: true }] }));
  assert.equal(gone.gone, true);
  assert.equal(store.live.jobs.size, 0);
});

test("slots stay as they were told", () => {
  store.receive(event({ slots: [{ slot: 0 }], now: 5 }));
  store.receive(event({ now: 9 }));
  assert.deepEqual([store.live.slots.length, store.live.slotsAt, store.live.head.now], [1, 5, 9]);
});

test("the newest enhance of the preview that is shown is taken over", () => {
  store.shown.jobId = "1";
  store.take(job());
  store.take(job({ id: "3", enhanced: true, parent_id: "1" }));
  store.take(job({ id: "2", enhanced: true, parent_id: "1" })); // an older one
  store.take(job({ id: "9" })); // somebody else's
  store.take(job({ id: "8", enhanced: true, parent_id: "9" }));
  assert.deepEqual(
    store.inPanel().map(({ id }) => id),
    ["1", "3"],
  );
  assert.equal(store.current().id, "3");
});

test("what was deleted from the panel does not come back by itself", () => {
  store.shown.jobId = "1";
  store.shown.deleted = job();
  store.take(job({ status: "COMPLETED" }));
  assert.deepEqual(store.inPanel(), []);
});

test("an enhance may be somebody else's: it is looked for when the history has grown", () => {
  store.shown.jobId = "1";
  store.take(job({ status: "COMPLETED" }));
  store.shown.listed = 1;
  store.receive(event({ listed: 1 }));
  assert.equal(store.enhanceAwaited(), false);
  store.receive(event({ listed: 2 }));
  assert.equal(store.enhanceAwaited(), true);
  store.take(job({ id: "2", enhanced: true, parent_id: "1" }));
  assert.equal(store.enhanceAwaited(), false);
  store.take(job({ id: "2", enhanced: true, parent_id: "1", status: "FAILED" }));
  assert.equal(store.enhanceAwaited(), true);
});

test("one hears of the panel's jobs, and of cards that may change while they are seen", () => {
  store.shown.jobId = "1";
  store.take(job({ status: "COMPLETED" }));
  const cards = [
    job({ id: "2" }),
    job({ id: "3", status: "COMPLETED" }),
    job({ id: "4", deleted_at: 5 }),
  ];
  store.listed = new Map(cards.map((card) => [card.id, card]));
  const ids = (hidden) => store.wanted(hidden).map(({ id }) => id);
  assert.deepEqual(ids(false), ["1", "2"]);
  assert.deepEqual(ids(true), ["1"]);
  store.shown.deleted = store.shown.preview;
  assert.deepEqual(ids(true), []);
});

test("a job is mine if it is nobody's, or mine, or if I am an admin", () => {
  const hers = job({ owner: "ann" });
  assert.equal(store.mine(hers), true); // not known yet: the server decides
  Object.assign(store.me, { name: "bob", login: true });
  assert.equal(store.mine(hers), false);
  assert.equal(store.notMine(hers), "Only ann or an admin can do this");
  assert.equal(store.mine(job()), true);
  store.me.admin = true;
  assert.equal(store.mine(hers), true);
});
