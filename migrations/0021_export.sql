-- Export: what is owed is found by its age, and what a receiver refuses for good is set aside.

-- The oldest batch holds retention back, and recovery takes the oldest first. A settle adds one entry
-- at the right end, and its acknowledgement leaves it to the next vacuum as it does the row. Measured
-- with 300,000 rows inserted and deleted again, twice with the index and twice without: 65 bytes of WAL
-- more for each (367 after 302), and no difference in time beyond the noise (between 54 s and 119 s).
-- `instance` is not indexed, so that an adoption stays a HOT update.
create index export_batches_at on tasker.export_batches (at);

-- Batches with spans that a receiver refused for good, as HTTP 400 or 413 and their like say. Nothing
-- waits for them, retention neither; `tasker trace replay --refused` moves them back.
create table tasker.refused_exports (
  batch_id    uuid primary key,
  task_uuids  uuid[] not null,
  at          timestamptz not null,
  refused_at  timestamptz not null default clock_timestamp(),
  spans       int not null,
  reason      text not null,
  constraint refused_exports_refuse_something check (spans > 0)
);
create index refused_exports_refused_at on tasker.refused_exports (refused_at);
