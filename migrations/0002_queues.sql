-- Messages are hints to look; so are timers. This file owns both, and who listens to them.

-- A queue of steps has a function that takes from it and one that puts into it: a statement with
-- the table's name in it is planned once a session there, and at every call if it is put together
-- by `execute`; that planning was half of a claim. They are called by `claim_steps` and
-- `conclude` alone, which have set what they run under.
create function tasker.create_queue_functions(p_queue text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $create$
begin
  execute format($functions$
    create or replace function tasker.%2$I(
      p_handlers text[], p_max int,
      out msg_ids bigint[], out steps uuid[], out attempts int[], out parents text[], out baggage text[]
    )
    language plpgsql
    as $$
    begin
      with picked as materialized (
        select q.msg_id from pgmq.%1$I q
        where q.vt <= clock_timestamp() and coalesce(q.message->>'handler' = any(p_handlers), true)
          and not exists (select from tasker.paused_queues p where p.queue = %4$L)
        order by q.msg_id limit p_max for update skip locked
      ), taken as (
        -- An array and not a join: a plan made while the queue was empty compared each row with each.
        delete from pgmq.%1$I q where q.msg_id = any(array(select p.msg_id from picked p))
        returning q.msg_id, q.read_ct, q.enqueued_at, q.message, q.headers,
          coalesce(tasker.is_uuid(q.message->>'step') and (q.message->>'attempt') ~ '^[0-9]{1,9}$'
            and q.message->>'v' = '1', false) as good
      ), bad as (
        insert into tasker.quarantine (queue, msg_id, read_ct, reason, message, headers, enqueued_at)
        select %4$L, t.msg_id, t.read_ct, 'not a step message: needs v = 1, step, attempt and handler', t.message, t.headers, t.enqueued_at
        from taken t where not t.good
      )
      select array_agg(t.msg_id), array_agg((t.message->>'step')::uuid), array_agg((t.message->>'attempt')::int),
             array_agg(t.headers->>'traceparent'), array_agg(t.headers->>'baggage')
      into msg_ids, steps, attempts, parents, baggage
      from taken t where t.good;
    end
    $$;
    create or replace function tasker.%3$I(p_destinations text[], p_bodies jsonb[], p_headers jsonb[]) returns void
    language plpgsql
    as $$
    begin
      insert into pgmq.%1$I (vt, message, headers)
      select clock_timestamp(), m.body, m.headers
      from unnest(p_destinations, p_bodies, p_headers) with ordinality as m(destination, body, headers, place)
      where m.destination = %4$L order by m.place;
    end
    $$;
    revoke all on function tasker.%2$I, tasker.%3$I from public;
  $functions$, 'q_' || p_queue, 'take_' || p_queue, 'put_' || p_queue, p_queue);
end
$create$;

create function tasker.create_queue(p_queue text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set client_min_messages = warning
as $$
begin
  if exists (select from pgmq.meta where queue_name = p_queue) then
    return;
  end if;
  perform pgmq.create(p_queue);
  -- A queue table is small and all churn: vacuum it early, leave room for the read's update.
  execute format(
    'alter table pgmq.%I set (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, '
    'autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0, '
    'autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 50000)',
    'q_' || p_queue);
  if p_queue like 'worker\_%' then
    perform tasker.create_queue_functions(p_queue);
  end if;
end
$$;

select tasker.create_queue('task_requests');
select tasker.create_queue('step_results');

-- "Look at these steps (or this task) at this time." A row here costs the steps table no
-- index on its times, so claims, heartbeats and retries stay HOT updates. It decides
-- nothing: sweep looks at the rows themselves, and drops or renews the hint.
create table tasker.due (
  due_id     bigint generated always as identity primary key,
  due_at     timestamptz not null,
  kind       text not null,
  task_uuid  uuid,
  step_uuids uuid[],
  worker     text,
  constraint due_kind_is_known check (kind in (
    'lease', 'retry', 'timer', 'signal', 'queue_timeout', 'step_timeout', 'total_timeout', 'start', 'schedule'))
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
create index due_by_time on tasker.due (due_at);
-- Who holds claims: looked at twice a second while somebody does.
create index due_by_worker on tasker.due (worker) where kind = 'lease';

create table tasker.quarantine (
  quarantine_id  bigint generated always as identity primary key,
  queue          text not null,
  msg_id         bigint not null,
  read_ct        int not null,
  failures       int not null default 0,
  reason         text not null,
  message        jsonb,
  headers        jsonb,
  enqueued_at    timestamptz not null,
  quarantined_at timestamptz not null default clock_timestamp()
);

-- Deterministic failures of one message; serialization and connection errors never count.
create table tasker.message_failures (
  queue     text not null,
  msg_id    bigint not null,
  failures  int not null,
  reason    text not null,
  last_at   timestamptz not null default clock_timestamp(),
  primary key (queue, msg_id)
);

-- Puts messages back for a moment, as if they had not been read: their task is settled by
-- somebody else right now, and that says nothing against the message.
create function tasker.put_back(p_queue text, p_msg_ids bigint[], p_delay interval) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  execute format('update pgmq.%I set vt = clock_timestamp() + $2, read_ct = greatest(read_ct - 1, 0) where msg_id = any($1)',
    'q_' || p_queue) using p_msg_ids, p_delay;
end
$$;

-- Moves messages out of the way, each with its reason and just as it is: what cannot be read
-- is never parsed. One that is gone already was dealt with by somebody else.
create function tasker.quarantine_messages(p_queue text, p_msg_ids bigint[], p_reasons text[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  execute format($q$
    with bad as (
      select b.msg_id, b.reason from unnest($2, $3) as b(msg_id, reason)
    ), failed as (
      delete from tasker.message_failures f using bad b where f.queue = $1 and f.msg_id = b.msg_id
      returning f.msg_id, f.failures
    ), taken as (
      delete from pgmq.%I q using bad b where q.msg_id = b.msg_id
      returning q.msg_id, q.read_ct, q.enqueued_at, q.message, q.headers, b.reason
    )
    insert into tasker.quarantine (queue, msg_id, read_ct, failures, reason, message, headers, enqueued_at)
    select $1, t.msg_id, t.read_ct, coalesce(f.failures, 1), t.reason, t.message, t.headers, t.enqueued_at
    from taken t left join failed f on f.msg_id = t.msg_id
  $q$, 'q_' || p_queue) using p_queue, p_msg_ids, p_reasons;
end
$$;

-- Rare things worth counting: append-only, so that counting never makes two writers wait.
create table tasker.counters (
  name  text not null,
  n     bigint not null,
  at    timestamptz not null default clock_timestamp()
);

-- Who reads which queue, and whether it sleeps. NOTIFY takes a lock shared by the whole
-- cluster at commit, so a sender notifies only a reader that has marked itself asleep.
create table tasker.readers (
  queue   text not null,
  reader  text not null,
  asleep  boolean not null default false,
  seen_at timestamptz not null default clock_timestamp(),
  primary key (queue, reader)
) with (fillfactor = 50);

create table tasker.workers (
  worker      text primary key,
  namespace   text not null,
  queues      text[] not null,
  handlers    text[] not null,
  slots       int not null,
  lock_key    bigint,
  version     text,
  started_at  timestamptz not null default clock_timestamp(),
  seen_at     timestamptz not null default clock_timestamp()
) with (fillfactor = 50);

-- One liveness row per orchestrator: its export batches are recovered when it is dead.
create table tasker.instances (
  instance    uuid primary key,
  seen_at     timestamptz not null default clock_timestamp(),
  started_at  timestamptz not null default clock_timestamp(),
  version     text not null
) with (fillfactor = 50);

-- One row per transaction that moved something, until its spans are acknowledged. It names
-- its transitions by (task, at): all moves of one transaction share `at`.
create table tasker.export_batches (
  batch_id    uuid primary key,
  instance    uuid,
  task_uuids  uuid[] not null,
  at          timestamptz not null
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

create function tasker.wake(p_queue text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (select from tasker.readers where queue = p_queue and asleep) then
    perform pg_notify('tasker', p_queue);
  end if;
end
$$;

-- What a settle does to queues, in one statement: deletes the messages and due hints it has
-- dealt with and sends the messages of steps, given in the order in which they are to be read.
-- It writes PGMQ's tables itself, as PGMQ's own functions would (docs/adr/0005): those plan
-- their statement anew at each call, which costs more than the statement.
create function tasker.conclude(
  p_queue text, p_msg_ids bigint[], p_due_ids bigint[], p_destinations text[], p_bodies jsonb[], p_headers jsonb[]
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_destination text;
begin
  if p_queue = 'step_results' then
    delete from pgmq.q_step_results where msg_id = any(p_msg_ids);
  elsif p_queue = 'task_requests' then
    delete from pgmq.q_task_requests where msg_id = any(p_msg_ids);
  end if;
  if cardinality(p_due_ids) > 0 then
    delete from tasker.due where due_id = any(p_due_ids);
  end if;
  for v_destination in select distinct d from unnest(p_destinations) d loop
    execute format('select tasker.%I($1, $2, $3)', 'put_' || v_destination) using p_destinations, p_bodies, p_headers;
    perform tasker.wake(v_destination);
  end loop;
end
$$;
