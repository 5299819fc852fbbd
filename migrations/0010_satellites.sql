-- What runs by the clock. A schedule submits tasks; it never touches one itself.
--
-- `next_at` is the only clock: whoever holds the row's lock and finds it past submits the
-- tick's task and moves `next_at` on in the same transaction, so a tick runs once however many
-- orchestrators look. A `schedule` hint in tasker.due wakes them; between ticks nothing looks.
create table tasker.schedules (
  schedule_uuid  uuid primary key default tasker.uuid7(),
  namespace      text not null,
  name           text not null,
  template       text not null,
  -- Null: the version registered last when the tick comes.
  version        text,
  input          jsonb not null default '{}',
  priority       int not null default 0,
  -- When: exactly one of the three.
  cron           text,
  time_zone      text,
  every_ms       bigint,
  once_at        timestamptz,
  -- Where an interval counts from.
  anchor_at      timestamptz not null default clock_timestamp(),
  missed         text not null default 'run_once',
  overlap        text not null default 'allow',
  paused         boolean not null default false,
  -- False: `next_at` only asks an orchestrator to work the next tick out.
  planned        boolean not null default false,
  next_at        timestamptz,
  last_at        timestamptz,
  last_task      uuid,
  runs           bigint not null default 0,
  skipped        bigint not null default 0,
  -- Why the last tick brought no task, or why there is no next one.
  problem        text,
  created_at     timestamptz not null default clock_timestamp(),
  constraint schedules_name_is_unique unique (namespace, name),
  constraint schedules_have_one_timing check (num_nonnulls(cron, every_ms, once_at) = 1),
  constraint schedules_zone_is_of_cron check ((cron is null) = (time_zone is null)),
  constraint schedules_interval_is_a_second_at_least check (every_ms >= 1000),
  constraint schedules_missed_is_known check (missed in ('skip', 'run_once', 'run_all')),
  constraint schedules_overlap_is_known check (overlap in ('allow', 'skip', 'cancel_previous'))
) with (fillfactor = 50);
create index schedules_by_next on tasker.schedules (next_at) where next_at is not null and not paused;

-- Asks an orchestrator to look at a schedule at once.
create function tasker.plan_schedule(p_schedule uuid) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := clock_timestamp();
begin
  update tasker.schedules set planned = false, next_at = v_now, problem = null where schedule_uuid = p_schedule;
  insert into tasker.due (due_at, kind) values (v_now, 'schedule');
  perform pg_notify('tasker', 'due');
end
$$;

-- Creates a schedule, or changes the one of that name. Answers created, changed or unchanged.
-- What only a calendar can say (a cron that never fires, an unknown time zone) an orchestrator
-- writes into `problem` a moment later; `tasker schedule set` refuses it at once.
create function tasker.set_schedule(
  namespace text, name text, template text, cron text default null, time_zone text default null,
  every interval default null, once_at timestamptz default null, version text default null,
  input jsonb default '{}', priority int default 0, missed text default 'run_once', overlap text default 'allow',
  paused boolean default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_every   bigint := extract(epoch from every) * 1000;
  v_zone    text := case when cron is not null then coalesce(time_zone, 'UTC') end;
  v_known   tasker.schedules;
  v_problem text;
  v_id      uuid;
  v_answer  text;
  v_timing  boolean;
begin
  v_problem := case
    when namespace is null or not (tasker.is_owner() or tasker.may_use(namespace)) then 'namespace: this role may not use it; ask for a row in tasker.role_namespaces'
    when namespace !~ '^[a-z](_?[a-z0-9])*$' or octet_length(namespace) > 40 then 'namespace: must match ^[a-z](_?[a-z0-9])*$ and have 40 bytes at most'
    when name is null or name !~ '^[a-z][a-z0-9_]{0,39}$' then 'name: must match ^[a-z][a-z0-9_]{0,39}$'
    when not exists (select from tasker.templates t where t.namespace = set_schedule.namespace and t.name = set_schedule.template
                     and (set_schedule.version is null or t.version = set_schedule.version))
      then format('template: no template %s%s is registered in namespace %s; register it first', left(template, 40), coalesce(' version ' || left(version, 64), ''), namespace)
    when num_nonnulls(cron, every, once_at) <> 1 then 'cron, every, once_at: give exactly one of the three'
    when time_zone is not null and cron is null then 'time_zone: is for cron only'
    when octet_length(cron) > 200 then 'cron: has more than 200 bytes'
    when v_every < 1000 then 'every: must be a second at least'
    when once_at >= '10000-01-01Z' then 'once_at: must be before the year 10000'
    when once_at <= clock_timestamp() then 'once_at: is in the past, so it would never fire'
    when missed is null or missed not in ('skip', 'run_once', 'run_all') then 'missed: must be skip, run_once or run_all'
    when overlap is null or overlap not in ('allow', 'skip', 'cancel_previous') then 'overlap: must be allow, skip or cancel_previous'
    when priority is null or priority not between -9999 and 9999 then 'priority: must be a whole number from -9999 to 9999; higher runs first'
    when jsonb_typeof(input) is distinct from 'object' then 'input: must be a JSON object'
    else 'input: ' || tasker.payload_problem(input, tasker.max_payload_bytes())
  end;
  if v_problem is not null then
    raise exception '%', v_problem using errcode = '22023';
  end if;

  select s.* into v_known from tasker.schedules s where s.namespace = set_schedule.namespace and s.name = set_schedule.name for no key update;
  if v_known.schedule_uuid is null then
    insert into tasker.schedules as s (namespace, name, template, version, input, priority, cron, time_zone, every_ms, once_at, missed, overlap, paused)
    values (namespace, name, template, version, input, priority, cron, v_zone, v_every, once_at, missed, overlap, coalesce(paused, false))
    returning s.schedule_uuid into v_id;
    v_answer := 'created';
    v_timing := true;
  else
    v_id := v_known.schedule_uuid;
    v_timing := (v_known.cron, v_known.time_zone, v_known.every_ms, v_known.once_at) is distinct from (cron, v_zone, v_every, once_at);
    if not v_timing and (v_known.template, v_known.version, v_known.input, v_known.priority, v_known.missed, v_known.overlap, v_known.paused)
      is not distinct from (template, version, input, priority, missed, overlap, coalesce(paused, v_known.paused)) then
      return 'unchanged';
    end if;
    update tasker.schedules s
    set template = set_schedule.template, version = set_schedule.version, input = set_schedule.input, priority = set_schedule.priority,
        cron = set_schedule.cron, time_zone = v_zone, every_ms = v_every, once_at = set_schedule.once_at,
        anchor_at = case when v_timing then clock_timestamp() else s.anchor_at end,
        missed = set_schedule.missed, overlap = set_schedule.overlap, paused = coalesce(set_schedule.paused, s.paused)
    where s.schedule_uuid = v_id;
    v_answer := 'changed';
    v_timing := v_timing or (v_known.paused and not coalesce(paused, v_known.paused));
  end if;
  if v_timing then
    perform tasker.plan_schedule(v_id);
  end if;
  insert into tasker.audit (subject, action, actor) values (format('schedule %s/%s', namespace, name), 'schedule.' || v_answer, left(actor, 100));
  return v_answer;
end
$$;

-- A paused schedule forgets its ticks: what would have run meanwhile is not missed.
create function tasker.pause_schedule(
  namespace text, name text, pause boolean default true, reason text default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_known tasker.schedules;
begin
  select s.* into v_known from tasker.schedules s
  where s.namespace = pause_schedule.namespace and s.name = pause_schedule.name and tasker.may_use(s.namespace) for no key update;
  if v_known.schedule_uuid is null then
    return 'no such schedule';
  end if;
  if v_known.paused is distinct from pause then
    update tasker.schedules s set paused = pause where s.schedule_uuid = v_known.schedule_uuid;
    if not pause then
      perform tasker.plan_schedule(v_known.schedule_uuid);
    end if;
    insert into tasker.audit (subject, action, actor, reason)
    values (format('schedule %s/%s', namespace, name), case when pause then 'schedule.pause' else 'schedule.resume' end, left(actor, 100), left(reason, 1000));
  end if;
  return 'accepted';
end
$$;

-- Removes a schedule; tasks it has submitted stay.
create function tasker.delete_schedule(
  namespace text, name text, reason text default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
begin
  delete from tasker.schedules s
  where s.namespace = delete_schedule.namespace and s.name = delete_schedule.name and tasker.may_use(s.namespace);
  if not found then
    return 'no such schedule';
  end if;
  insert into tasker.audit (subject, action, actor, reason)
  values (format('schedule %s/%s', namespace, name), 'schedule.delete', left(actor, 100), left(reason, 1000));
  return 'accepted';
end
$$;

-- Submits the task of one tick, in the caller's transaction. Answers the task, or nothing and why not.
-- The key makes the same tick the same task; a run begins a trace of its own.
create function tasker.fire_schedule(p_schedule uuid, p_tick timestamptz, p_kind text default 'tick', out task_uuid uuid, out problem text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_schedule tasker.schedules;
  v_state    text;
  v_tick     text := to_char(p_tick at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS')
                     || case when p_tick = date_trunc('second', p_tick) then 'Z' else to_char(p_tick at time zone 'UTC', '.US"Z"') end;
  v_task     uuid;
  v_problem  text;
begin
  select s.* into v_schedule from tasker.schedules s where s.schedule_uuid = p_schedule for no key update;
  if v_schedule.overlap <> 'allow' and v_schedule.last_task is not null then
    select t.state into v_state from tasker.tasks t
    where t.task_uuid = v_schedule.last_task and t.state not in ('complete', 'error', 'cancelled', 'resolved_manually');
    if v_state is not null and v_schedule.overlap = 'skip' then
      v_problem := format('the run of %s was skipped: task %s is still %s', v_tick, v_schedule.last_task, tasker.status_word(v_state));
      update tasker.schedules s set last_at = p_tick, skipped = s.skipped + 1, problem = v_problem where s.schedule_uuid = p_schedule;
      problem := v_problem;
      return;
    elsif v_state is not null then
      perform tasker.cancel_task(task => v_schedule.last_task, reason => format('the run of %s has come', v_tick),
        actor => format('schedule %s/%s', v_schedule.namespace, v_schedule.name));
    end if;
  end if;

  select t.task_uuid, t.error into v_task, v_problem
  from tasker.submit_tasks(jsonb_build_array(jsonb_build_object(
    'namespace', v_schedule.namespace, 'template', v_schedule.template, 'version', v_schedule.version,
    -- Neither text has a character that JSON would escape.
    'input', replace(replace(v_schedule.input::text, '${schedule.at}', v_tick), '${schedule.name}', v_schedule.name)::jsonb,
    'priority', v_schedule.priority,
    'correlation_id', format('%s/%s@%s', v_schedule.namespace, v_schedule.name, v_tick),
    'idempotency_key', format('schedule/%s/%s/%s', p_schedule, p_kind, v_tick)))) t;
  v_problem := format('the run of %s was refused: %s', v_tick, v_problem);
  update tasker.schedules s
  set last_at = p_tick, last_task = coalesce(v_task, s.last_task), runs = s.runs + (v_task is not null)::int,
      problem = case when v_task is null then v_problem end
  where s.schedule_uuid = p_schedule;
  if v_task is null then
    insert into tasker.counters (name, n) values ('schedule_refused', 1);
    problem := v_problem;
  end if;
  task_uuid := v_task;
end
$$;

-- Runs a schedule now, whether or not it is paused; its next tick comes as if nothing had been.
create function tasker.trigger_schedule(
  namespace text, name text, reason text default null, actor text default session_user,
  out task_uuid uuid, out problem text
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_id uuid;
begin
  select s.schedule_uuid into v_id from tasker.schedules s
  where s.namespace = trigger_schedule.namespace and s.name = trigger_schedule.name and tasker.may_use(s.namespace);
  if v_id is null then
    problem := 'no such schedule';
    return;
  end if;
  select f.task_uuid, f.problem into task_uuid, problem from tasker.fire_schedule(v_id, clock_timestamp(), 'trigger') f;
  if task_uuid is not null then
    insert into tasker.audit (task_uuid, subject, action, actor, reason)
    values (task_uuid, format('schedule %s/%s', namespace, name), 'schedule.trigger', left(actor, 100), left(reason, 1000));
  end if;
end
$$;

revoke all on all functions in schema tasker from public;
