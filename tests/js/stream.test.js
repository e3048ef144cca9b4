import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import { Store } from "../../mochi_app/web/page/state.js";
import { Stream } from "../../mochi_app/web/page/stream.js";
import { FakeEventSource, job } from "./doubles.js";

let store;
let stream;
let told;

beforeEach((t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  globalThis.document = { hidden: false };
  globalThis.EventSource = FakeEventSource;
  globalThis.fetch = async () => ({ status: 200 });
  FakeEventSource.opened = [];
  store = new Store();
  stream = new Stream(store);
  told = [];
  for (const name of ["announce", "back", "connection", "heard"]) {
    store.on(name, (detail) => told.push(name === "announce" ? detail : name));
  }
});

const opened = () => FakeEventSource.opened.length;
const asked = () => new URL(FakeEventSource.newest.url, "http://host").searchParams;

test("it is opened again ever later, and soon once it has been there", (t) => {
  stream.follow();
  for (const pause of [1000, 2000, 4000, 5000, 5000]) {
    const before = opened();
    FakeEventSource.newest.fail();
    t.mock.timers.tick(pause - 1);
    assert.equal(opened(), before);
    t.mock.timers.tick(1);
    assert.equal(opened(), before + 1);
  }
  FakeEventSource.newest.tell({});
  FakeEventSource.newest.fail();
  const before = opened();
  t.mock.timers.tick(1000);
  assert.equal(opened(), before + 1);
});

test("that it is lost is told once, and that it is back", () => {
  const lost = "Connection lost. Trying to reconnect.";
  stream.follow();
  FakeEventSource.newest.tell({});
  FakeEventSource.newest.fail();
  assert.deepEqual(told, ["heard", "connection", lost]);
  assert.equal(store.live.connected, false);
  stream.follow();
  FakeEventSource.newest.fail();
  assert.equal(told.filter((text) => text === lost).length, 1);
  stream.follow();
  told.length = 0;
  FakeEventSource.newest.tell({});
  FakeEventSource.newest.tell({});
  assert.deepEqual(told.slice(0, 3), ["heard", "back", "heard"]);
});

test("whoever is logged out is told so", async () => {
  globalThis.fetch = async () => ({ status: 401 });
  await stream.askForLogin();
  assert.equal(store.live.loggedOut, true);
  assert.deepEqual(told, ["connection"]);
});

test("an error of a stream that was given up is none", () => {
  stream.follow();
  const old = FakeEventSource.newest;
  stream.open();
  old.fail();
  assert.equal(FakeEventSource.newest.closed, false);
  assert.equal(store.live.connected, null);
});

test("a silent stream is given up", (t) => {
  const now = t.mock.method(performance, "now", () => 0);
  stream.follow();
  FakeEventSource.newest.tell({});
  now.mock.mockImplementation(() => 45000);
  stream.check();
  assert.equal(FakeEventSource.newest.closed, false);
  now.mock.mockImplementation(() => 45001);
  stream.check();
  assert.equal(FakeEventSource.newest.closed, true);
});

test("jobs that come onto the page are named, together", (t) => {
  stream.follow();
  assert.equal(asked().get("jobs"), "");
  store.listed.set("1", job());
  stream.name();
  store.listed.set("2", job({ id: "2" }));
  stream.name();
  t.mock.timers.tick(49);
  assert.equal(opened(), 1);
  t.mock.timers.tick(1);
  assert.equal(opened(), 2);
  assert.equal(FakeEventSource.opened[0].closed, true);
  assert.equal(asked().get("jobs"), "1,2");
  assert.equal(asked().get("pictures"), "1,2");
  store.listed.delete("1"); // what leaves does no harm
  stream.name();
  t.mock.timers.tick(1000);
  assert.equal(opened(), 2);
});

test("a hidden page looks now and then at what it waits for, and holds nothing else", () => {
  stream.follow();
  store.shown.jobId = "1";
  store.take(job());
  store.listed.set("2", job({ id: "2" }));
  document.hidden = true;
  stream.follow();
  assert.deepEqual(Object.fromEntries(asked()), { jobs: "1", hidden: "true" });
  FakeEventSource.newest.fail(FakeEventSource.CONNECTING); // the server ends it
  assert.equal(FakeEventSource.newest.closed, false);
  store.take(job({ status: "COMPLETED" }));
  stream.follow();
  assert.equal(FakeEventSource.newest.closed, true);
  const before = opened();
  document.hidden = false;
  stream.follow();
  assert.equal(opened(), before + 1);
});
