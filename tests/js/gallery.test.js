import assert from "node:assert/strict";
import { test } from "node:test";
import { equal, reconcile } from "../../mochi_app/web/page/gallery.js";
import { job } from "./doubles.js";

class FakeCard {
  constructor(shown) {
    this.job = shown;
  }

  update(shown) {
    this.job = shown;
  }
}

const make = (shown) => new FakeCard(shown);
const jobs = (...ids) => ids.map((id) => job({ id }));

test("cards are kept, in the order of the jobs, and those of other jobs leave", () => {
  const before = reconcile(new Map(), jobs("1", "2", "3"), make);
  const newer = [job({ id: "4" }), job({ id: "3", starred: true }), job({ id: "1" })];
  const after = reconcile(before, newer, make);
  assert.deepEqual([...after.keys()], ["4", "3", "1"]);
  assert.equal(after.get("3"), before.get("3"));
  assert.equal(after.get("3").job.starred, true);
  assert.equal(after.get("1"), before.get("1"));
});

test("a job that goes to the trash or comes back has another card", () => {
  const there = reconcile(new Map(), jobs("1"), make);
  const trashed = reconcile(there, [job({ deleted_at: 5 })], make);
  assert.notEqual(trashed.get("1"), there.get("1"));
  assert.equal(trashed.get("1").job.deleted_at, 5);
  assert.equal(reconcile(trashed, [job({ deleted_at: 6 })], make).get("1"), trashed.get("1"));
  assert.notEqual(reconcile(trashed, jobs("1"), make).get("1"), trashed.get("1"));
});

test("lists are equal when they have the same in the same order", () => {
  assert.ok(equal([1, 2], [1, 2]));
  assert.ok(!equal([1, 2], [2, 1]));
  assert.ok(!equal([1], [1, 2]));
  assert.ok(!equal([1, 2], [1]));
});
