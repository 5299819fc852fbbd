-- Flow control: what an operator pauses, and how much may be in flight at once or begin in a
-- time. All of it is admission before send, so a task that nothing limits never reads these.

create table tasker.paused_queues (
  queue   text primary key,
  actor   text not null,
  reason  text
);

-- The namespace of a queue of steps, or null: worker_shop and worker_shop__slow are of shop.
create function tasker.queue_namespace(p_queue text) returns text
language sql immutable parallel safe
as $$ select case when p_queue like 'worker\_%' then split_part(substring(p_queue from 8), '__', 1) end $$;

-- Nothing more is sent to a paused queue, and nothing in it is claimed; what runs runs on.
-- Returns 'accepted', or why not. Again is no error: the new reason takes the old one's place.
create function tasker.pause_queue(
  queue text, reason text default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
begin
  if tasker.queue_namespace(queue) is null or not exists (select from pgmq.meta m where m.queue_name = queue)
    or not tasker.may_use(tasker.queue_namespace(queue)) then
    return 'no such queue of steps; `tasker queue list` shows those that are';
  end if;
  insert into tasker.paused_queues as p (queue, actor, reason) values (queue, left(actor, 100), left(reason, 1000))
  on conflict on constraint paused_queues_pkey do update set actor = excluded.actor, reason = excluded.reason;
  insert into tasker.audit (subject, action, actor, reason)
  values ('queue ' || queue, 'pause', left(actor, 100), left(reason, 1000));
  perform pg_notify('tasker', 'admit');
  return 'accepted';
end
$$;

-- Lets a paused queue go on: what lies in it is claimed again, what was held is sent.
create function tasker.resume_queue(
  queue text, reason text default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
begin
  if not coalesce(tasker.may_use(tasker.queue_namespace(queue)), false) then
    return 'no such queue of steps; `tasker queue list` shows those that are';
  end if;
  delete from tasker.paused_queues p where p.queue = resume_queue.queue;
  if not found then
    return 'the queue is not paused';
  end if;
  insert into tasker.audit (subject, action, actor, reason)
  values ('queue ' || queue, 'resume', left(actor, 100), left(reason, 1000));
  perform pg_notify('tasker', 'admit');
  perform tasker.wake(queue);
  return 'accepted';
end
$$;

-- A limit: of a namespace, of a handler in a namespace, or of what a template names (its rows
-- come and go with use, the template holds the numbers). The row's lock is what those who
-- admit held steps take turns by; nobody else locks it.
create table tasker.limits (
  limit_id     bigint generated always as identity primary key,
  namespace    text not null,
  kind         text not null,
  name         text not null,
  -- At most so many in flight at once.
  concurrency  int,
  -- At most so many in each so many milliseconds: a bucket of `rate` tokens, refilled evenly.
  rate         int,
  per_ms       bigint,
  tokens       float8,
  filled_at    timestamptz,
  created_at   timestamptz not null default clock_timestamp(),
  constraint limits_name_is_unique unique (name),
  constraint limits_kind_is_known check (kind in ('namespace', 'handler', 'template')),
  constraint limits_are_positive check (concurrency > 0 and rate > 0 and per_ms > 0),
  constraint limits_rate_has_a_time check ((rate is null) = (per_ms is null))
) with (fillfactor = 70);

-- A place under a limit. It counts while its step is in flight, so whatever closes the attempt
-- gives it back, in the same transaction; the next who admits under the limit clears it away.
create table tasker.places (
  limit_id   bigint not null,
  step_uuid  uuid not null,
  primary key (limit_id, step_uuid)
);

create function tasker.is_in_flight(p_state text) returns boolean
language sql immutable parallel safe
as $$ select p_state in ('enqueued', 'in_progress', 'enqueued_for_orchestration', 'enqueued_as_error_for_orchestration') $$;

-- What limits allow and what of it is used, now. Without locks it is an estimate.
create function tasker.limit_use(p_names text[])
returns table (limit_id bigint, namespace text, kind text, name text, concurrency int, in_use bigint,
               rate int, per_ms bigint, tokens float8, next_ms float8)
language sql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  select l.limit_id, l.namespace, l.kind, l.name, l.concurrency, u.in_use, l.rate, l.per_ms, t.tokens,
    case when t.tokens < 1 then ceil((1 - t.tokens) * l.per_ms / l.rate) end
  from tasker.limits l
  cross join lateral (
    select count(*) as in_use from tasker.places p
    join tasker.steps s on s.step_uuid = p.step_uuid and tasker.is_in_flight(s.state)
    where p.limit_id = l.limit_id) u
  cross join lateral (
    select least(l.rate, coalesce(l.tokens, l.rate)
      + greatest(extract(epoch from clock_timestamp() - coalesce(l.filled_at, clock_timestamp())), 0) * 1000 * l.rate / l.per_ms)::float8 as tokens) t
  where l.name = any(p_names)
$$;

-- Takes the locks of these limits, in the order of their ids, and says what they have left.
-- Limits of templates that have no row yet get one. Called after tasks and steps are locked.
create function tasker.lock_limits(
  p_namespaces text[], p_names text[], p_template boolean[], p_concurrency int[], p_rate int[], p_per_ms bigint[]
) returns table (limit_id bigint, name text, places bigint, tokens float8)
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  v_ids bigint[];
begin
  insert into tasker.limits (namespace, kind, name, concurrency, rate, per_ms)
  select distinct on (n.name) n.namespace, 'template', n.name, n.concurrency, n.rate, n.per_ms
  from unnest(p_namespaces, p_names, p_template, p_concurrency, p_rate, p_per_ms) as n(namespace, name, template, concurrency, rate, per_ms)
  where n.template and not exists (select from tasker.limits l where l.name = n.name)
  order by n.name
  on conflict do nothing;

  v_ids := array(select l.limit_id from tasker.limits l where l.name = any(p_names) order by l.limit_id for no key update);

  -- Another version of the template may give another number.
  update tasker.limits l set concurrency = n.concurrency, rate = n.rate, per_ms = n.per_ms
  from unnest(p_names, p_template, p_concurrency, p_rate, p_per_ms) as n(name, template, concurrency, rate, per_ms)
  where l.name = n.name and n.template and l.limit_id = any(v_ids)
    and (l.concurrency, l.rate, l.per_ms) is distinct from (n.concurrency, n.rate, n.per_ms);
  delete from tasker.places p
  where p.limit_id = any(v_ids)
    and not exists (select from tasker.steps s where s.step_uuid = p.step_uuid and tasker.is_in_flight(s.state));

  return query
    select u.limit_id, u.name, u.concurrency - u.in_use, u.tokens from tasker.limit_use(p_names) u
    where u.limit_id = any(v_ids);
end
$$;

-- The lanes in which steps of a queue are held, most urgent first, those behind `p_after` before
-- the others: at most `p_look`, each for one probe of an index, however many steps wait in them.
create function tasker.held_lanes(p_queue text, p_after text, p_look int)
returns table (priority int, lane text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  v_after text collate "C" := p_after;
  v_lane  text collate "C";
  v_left  int := p_look;
begin
  select s.priority into priority from tasker.steps s
  where s.queue = p_queue and s.held_by is not null and s.lane is not null order by s.priority desc limit 1;
  while priority is not null loop
    for v_round in 1..2 loop
      v_lane := case v_round when 1 then v_after else '' end;
      loop
        select s.lane into lane from tasker.steps s
        where s.queue = p_queue and s.held_by is not null and s.lane is not null
          and s.priority = held_lanes.priority and s.lane > v_lane
        order by s.lane limit 1;
        exit when lane is null or (v_round = 2 and lane > v_after);
        return next;
        v_left := v_left - 1;
        if v_left <= 0 then
          return;
        end if;
        v_lane := lane;
      end loop;
    end loop;
    select s.priority into priority from tasker.steps s
    where s.queue = p_queue and s.held_by is not null and s.lane is not null and s.priority < held_lanes.priority
    order by s.priority desc limit 1;
  end loop;
end
$$;

-- The first steps of each of these lanes.
create function tasker.first_in_lanes(p_queue text, p_priorities int[], p_lanes text[], p_quotas int[])
returns table (task_uuid uuid, step_uuid uuid, place int, ready_at timestamptz)
language sql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  select f.task_uuid, f.step_uuid, l.place::int, f.ready_at
  from unnest(p_priorities, p_lanes, p_quotas) with ordinality as l(priority, lane, quota, place)
  cross join lateral (
    select s.task_uuid, s.step_uuid, s.ready_at from tasker.steps s
    join tasker.tasks t on t.task_uuid = s.task_uuid and t.state <> 'suspended'
    where s.queue = p_queue and s.held_by is not null and s.lane is not null and s.priority = l.priority and s.lane = l.lane collate "C"
    order by s.ready_at limit l.quota) f
$$;

-- Sets the limit of a namespace, or of one handler in it. It takes effect for what is not yet
-- sent; what was sent before runs on, uncounted. Returns 'accepted', or why not.
create function tasker.set_limit(
  namespace text, handler text default null, concurrency int default null, rate int default null,
  per interval default null, reason text default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_name text := namespace || coalesce(':' || handler, '');
  v_per  bigint := extract(epoch from per) * 1000;
begin
  if not tasker.may_use(namespace) then
    return 'namespace: this role may not use it; ask for a row in tasker.role_namespaces';
  elsif namespace !~ '^[a-z](_?[a-z0-9])*$' then
    return 'namespace: may hold only a-z, 0-9 and single _ between them, and starts with a letter';
  elsif handler !~ '^[a-z][a-z0-9_]*(\.[a-z0-9_]+)*$' then
    return 'handler: may hold only a-z, 0-9 and _ in parts separated by dots, and starts with a letter';
  elsif concurrency is null and rate is null then
    return 'concurrency: give it, or rate and per, or all of them; `tasker limit remove` removes a limit';
  elsif concurrency < 1 then
    return 'concurrency: must be at least 1; pause the queue to let nothing run';
  elsif rate < 1 then
    return 'rate: must be at least 1; pause the queue to let nothing run';
  elsif (rate is null) <> (per is null) or v_per < 1 then
    return 'per: goes with rate, and is at least a millisecond, such as 1s';
  end if;
  insert into tasker.limits as l (namespace, kind, name, concurrency, rate, per_ms)
  values (namespace, case when handler is null then 'namespace' else 'handler' end, v_name, concurrency, rate, v_per)
  on conflict on constraint limits_name_is_unique do update
  set concurrency = excluded.concurrency, rate = excluded.rate, per_ms = excluded.per_ms, tokens = null, filled_at = null;
  insert into tasker.audit (subject, action, actor, reason)
  values (concat_ws(', ', 'limit ' || v_name, concurrency || ' at once', rate || ' per ' || v_per || ' ms'),
    'set_limit', left(actor, 100), left(reason, 1000));
  perform pg_notify('tasker', 'admit');
  return 'accepted';
end
$$;

create function tasker.remove_limit(
  namespace text, handler text default null, reason text default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_name text := namespace || coalesce(':' || handler, '');
  v_id   bigint;
begin
  if tasker.may_use(namespace) then
    delete from tasker.limits l where l.name = v_name and l.kind <> 'template' returning l.limit_id into v_id;
  end if;
  if v_id is null then
    return 'there is no such limit; `tasker limit list` shows those that are';
  end if;
  delete from tasker.places p where p.limit_id = v_id;
  insert into tasker.audit (subject, action, actor, reason) values ('limit ' || v_name, 'remove_limit', left(actor, 100), left(reason, 1000));
  perform pg_notify('tasker', 'admit');
  return 'accepted';
end
$$;

-- Limits of templates that nobody has a place under and whose bucket is full again: without a
-- row they allow the same. In bounded batches; one that is being used is let be.
create function tasker.forget_limits(p_max int default 1000, p_age interval default '1 h') returns int
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids bigint[];
begin
  v_ids := array(
    select l.limit_id from tasker.limits l
    where l.kind = 'template' and l.created_at < clock_timestamp() - p_age
      and (l.filled_at is null or l.filled_at < clock_timestamp() - make_interval(secs => l.per_ms / 1000.0))
      and not exists (select from tasker.places p join tasker.steps s on s.step_uuid = p.step_uuid and tasker.is_in_flight(s.state)
                      where p.limit_id = l.limit_id)
    order by l.limit_id limit p_max for update skip locked);
  delete from tasker.places p where p.limit_id = any(v_ids)
    and not exists (select from tasker.steps s where s.step_uuid = p.step_uuid and tasker.is_in_flight(s.state));
  delete from tasker.limits l where l.limit_id = any(v_ids) and not exists (select from tasker.places p where p.limit_id = l.limit_id);
  return coalesce(cardinality(v_ids), 0);
end
$$;

revoke all on all functions in schema tasker from public;
