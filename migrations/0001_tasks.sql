-- What a task is: its template, its row, its steps, its log and its attempts.
--
-- A row's state is a column; every move of it is also a row of `transitions`, written in
-- the same transaction. Nothing on the hot path has a foreign key: a foreign key takes row
-- locks, and every writer here already holds the lock of the task.

create function tasker.uuid7() returns uuid
language sql volatile parallel safe
as $$
  -- RFC 9562 version 7: 48 bits of milliseconds by the database clock, the rest random.
  select encode(
    set_bit(set_bit(
      overlay(uuid_send(gen_random_uuid())
              placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
              from 1 for 6),
      52, 1), 53, 1), 'hex')::uuid
$$;

create function tasker.uuid7_floor(at timestamptz) returns uuid
language sql immutable strict parallel safe
as $$
  -- The smallest uuid that a task created at this time can have; partition bounds use it.
  select encode(substring(int8send((extract(epoch from at) * 1000)::bigint) from 3)
                || decode('00000000000000000000', 'hex'), 'hex')::uuid
$$;

create table tasker.templates (
  template_id  int generated always as identity primary key,
  namespace    text not null,
  name         text not null,
  version      text not null,
  definition   jsonb not null,
  created_at   timestamptz not null default clock_timestamp(),
  constraint templates_version_is_unique unique (namespace, name, version)
);

create table tasker.template_steps (
  template_id   int not null references tasker.templates,
  step_index    int not null,
  name          text not null,
  handler       text not null,
  queue         text not null,
  max_attempts  int not null,
  run_ms        bigint,
  heartbeat_ms  bigint not null,
  primary key (template_id, step_index),
  constraint template_steps_name_is_unique unique (template_id, name)
);

create table tasker.template_edges (
  template_id   int not null references tasker.templates,
  parent_index  int not null,
  child_index   int not null,
  primary key (template_id, parent_index, child_index)
);
create index template_edges_by_child on tasker.template_edges (template_id, child_index, parent_index);

create table tasker.tasks (
  task_uuid             uuid primary key,
  namespace             text not null,
  template_id           int not null,
  state                 text not null default 'pending',
  version               int not null default 0,
  generation            int not null default 1,
  correlation_id        text not null,
  parent_correlation_id text,
  parent_task_uuid      uuid,
  parent_step_uuid      uuid,
  parent_attempt        int,
  idempotency_key       text,
  priority              int not null default 0,
  input                 jsonb not null default '{}',
  -- Counts of this task's steps; a settle changes them, claim and report never do.
  open_steps            int not null default 0,
  in_flight_steps       int not null default 0,
  retrying_steps        int not null default 0,
  -- Held back, or waiting for something that is not a worker.
  held_steps            int not null default 0,
  failed_steps          int not null default 0,
  -- Why it failed, was cancelled or waits for a person.
  error_type            text,
  reason                text,
  ended_by              text,
  suspended_from        text,
  -- The trace.
  trace_id              bytea not null,
  root_span_id          bytea not null,
  remote_span_id        bytea,
  -- The traceparent that the root is linked to, where that is not its parent.
  root_link             text,
  -- Bit 0 is W3C's "sampled". Bit 7 is ours and never sent: an awaited task whose trace was not sampled, and
  -- may be kept for the end of the topmost task.
  trace_flags           smallint not null default 1,
  tracestate            text,
  baggage               text,
  -- Database time only.
  created_at            timestamptz not null,
  run_at                timestamptz,
  generation_began_at   timestamptz not null,
  last_at               timestamptz not null,
  finished_at           timestamptz,
  constraint tasks_state_is_known check (state in (
    'pending', 'steps_in_process', 'waiting_for_dependencies', 'waiting_for_retry',
    'blocked_by_failures', 'suspended', 'complete', 'error', 'cancelled', 'resolved_manually')),
  constraint tasks_counts_are_not_negative check (
    open_steps >= 0 and in_flight_steps >= 0 and retrying_steps >= 0 and held_steps >= 0 and failed_steps >= 0),
  constraint tasks_waiting_means_nothing_in_flight check (
    state not in ('waiting_for_dependencies', 'waiting_for_retry', 'blocked_by_failures') or in_flight_steps = 0),
  constraint tasks_finished_has_a_time check (
    (state in ('complete', 'error', 'cancelled', 'resolved_manually')) = (finished_at is not null)),
  constraint tasks_trace_ids_have_their_length check (
    length(trace_id) = 16 and length(root_span_id) = 8 and (remote_span_id is null or length(remote_span_id) = 8))
) with (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.1);
create index tasks_by_correlation on tasker.tasks (correlation_id);

create table tasker.idempotency_keys (
  namespace     text not null,
  key           text not null,
  task_uuid     uuid not null,
  request_hash  bytea not null,
  primary key (namespace, key)
);

create table tasker.steps (
  step_uuid              uuid primary key,
  task_uuid              uuid not null,
  step_index             int not null,
  -- Its place in the list that a map runs over; -1 of every step that is not an item.
  item                   int not null default -1,
  queue                  text not null,
  priority               int not null default 0,
  state                  text not null default 'pending',
  version                int not null default 0,
  generation             int not null default 1,
  attempt                int not null default 0,
  -- Budgets count within a generation, attempt numbers never restart.
  failures               int not null default 0,
  losses                 int not null default 0,
  -- Dependencies that are neither done nor skipped, and those that were skipped.
  remaining_dependencies int not null,
  skipped_dependencies   int not null default 0,
  input                  jsonb,
  -- The open attempt: where its Enqueue stands in the log, and who holds it.
  enqueued_version       int,
  enqueued_task_version  int,
  enqueued_event         text,
  enqueued_began_at      timestamptz,
  enqueued_at            timestamptz,
  claim_token            uuid,
  claimed_by             text,
  lease_expires_at       timestamptz,
  last_heartbeat_at      timestamptz,
  progress               jsonb,
  -- A retry that waits, or a ready step that is held back.
  due_at                 timestamptz,
  ready_at               timestamptz,
  held_by                text,
  -- Where it waits among those held by a limit or for their turn: fair key, handler and limits.
  -- Set when such a step is held, by a statement of its own, and never changed by another.
  lane                   text collate "C",
  last_at                timestamptz not null,
  constraint steps_state_is_known check (state in (
    'pending', 'enqueued', 'in_progress', 'enqueued_for_orchestration', 'enqueued_as_error_for_orchestration',
    'waiting_for_retry', 'waiting', 'complete', 'error', 'cancelled', 'skipped', 'resolved_manually')),
  constraint steps_dependencies_are_not_negative check (remaining_dependencies >= 0 and skipped_dependencies >= 0),
  constraint steps_in_progress_is_claimed check (
    state <> 'in_progress' or (claim_token is not null and lease_expires_at is not null)),
  constraint steps_held_is_due check (held_by is null or (state in ('pending', 'waiting_for_retry') and ready_at is not null)),
  constraint steps_retry_has_a_due_time check (state <> 'waiting_for_retry' or due_at is not null)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.1);
create unique index steps_by_task on tasker.steps (task_uuid, step_index, item);
-- Its columns change only when a step is held, so an ordinary step's updates stay HOT.
create index steps_held on tasker.steps (queue, priority desc, ready_at) where held_by is not null and lane is null;
create index steps_in_lanes on tasker.steps (queue, priority desc, lane, ready_at) where held_by is not null and lane is not null;

-- The append-only log. `entity_uuid` is the task itself or one of its steps, `version` the
-- entity's ordinal; applying one move twice violates the primary key.
create table tasker.transitions (
  task_uuid     uuid not null,
  entity_uuid   uuid not null,
  version       int not null,
  task_version  int,
  generation    int not null,
  attempt       int,
  from_state    text not null,
  to_state      text not null,
  event         text not null,
  actor         text,
  claim_token   uuid,
  began_at      timestamptz not null,
  at            timestamptz not null,
  detail        jsonb,
  primary key (task_uuid, entity_uuid, version)
) partition by range (task_uuid);

create table tasker.attempts (
  task_uuid          uuid not null,
  step_uuid          uuid not null,
  attempt            int not null,
  generation         int not null,
  claim_token        uuid not null,
  worker             text not null,
  worker_version     text,
  message_id         bigint,
  result_message_id  bigint,
  claim_began_at     timestamptz not null,
  claimed_at         timestamptz not null,
  report_began_at    timestamptz,
  reported_at        timestamptz,
  start_offset_ms    double precision,
  run_ms             double precision,
  outcome            text,
  output             jsonb,
  error              jsonb,
  usage              jsonb,
  milestones         jsonb,
  primary key (task_uuid, step_uuid, attempt)
) partition by range (task_uuid);

-- Both are partitioned by the task's uuid, never by the row's own time: retention drops a
-- partition when all its tasks are done, and never amputates a long-running one. The
-- default partition catches a clock far off; it is meant to stay empty. An attempt grows once,
-- when it is reported: its page keeps room for that, so that no index is written again.
create table tasker.transitions_default partition of tasker.transitions default;
create table tasker.attempts_default partition of tasker.attempts default with (fillfactor = 45);

create function tasker.ensure_partitions(weeks_ahead int default 4) returns int
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_week timestamptz := date_trunc('week', clock_timestamp() at time zone 'UTC') at time zone 'UTC';
  v_made int := 0;
  v_from timestamptz;
  v_name text;
begin
  for i in 0..weeks_ahead loop
    v_from := v_week + make_interval(weeks => i);
    v_name := to_char(v_from at time zone 'UTC', '"_"YYYYMMDD');
    if to_regclass('tasker.transitions' || v_name) is null then
      execute format('create table tasker.%I partition of tasker.transitions for values from (%L) to (%L)',
        'transitions' || v_name, tasker.uuid7_floor(v_from), tasker.uuid7_floor(v_from + interval '1 week'));
      execute format('create table tasker.%I partition of tasker.attempts for values from (%L) to (%L) with (fillfactor = 45)',
        'attempts' || v_name, tasker.uuid7_floor(v_from), tasker.uuid7_floor(v_from + interval '1 week'));
      v_made := v_made + 1;
    end if;
  end loop;
  return v_made;
end
$$;
select tasker.ensure_partitions();

-- What a person did to a task (or to a schedule or a queue: `subject`), in the same transaction
-- as its effect. Append-only.
create table tasker.audit (
  audit_id   bigint generated always as identity primary key,
  task_uuid  uuid,
  subject    text,
  action     text not null,
  actor      text not null,
  reason     text,
  details    jsonb,
  at         timestamptz not null default clock_timestamp(),
  constraint audit_is_about_something check (num_nonnulls(task_uuid, subject) > 0)
);
create index audit_by_task on tasker.audit (task_uuid);

-- What a settle writes, a row each: `store/apply.sql` takes arrays of these.
create type tasker.task_change as (
  task_uuid uuid, state text, version int, version_before int, generation int, open_steps int, in_flight_steps int,
  retrying_steps int, held_steps int, failed_steps int, error_type text, reason text, ended_by text
);
create type tasker.step_change as (
  step_uuid uuid, state text, version int, version_before int, generation int, attempt int, failures int, losses int,
  remaining_dependencies int, input jsonb, due_at timestamptz, ready_at timestamptz, held_by text, enqueued bool,
  enqueued_version int, enqueued_task_version int, enqueued_event text
);
create type tasker.new_step as (
  step_uuid uuid, task_uuid uuid, step_index int, item int, queue text, priority int, state text, version int,
  generation int, attempt int, remaining_dependencies int, input jsonb, ready_at timestamptz, held_by text,
  enqueued bool, enqueued_version int, enqueued_task_version int, enqueued_event text
);
create type tasker.log_row as (
  task_uuid uuid, entity_uuid uuid, version int, task_version int, generation int, attempt int, from_state text,
  to_state text, event text, actor text, claim_token uuid, detail jsonb
);
create type tasker.due_row as (due_at timestamptz, kind text, task_uuid uuid, step_uuid uuid);
