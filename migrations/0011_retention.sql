-- What is kept, and for how long. Without a policy everything is kept for ever.

-- `*` is the policy of every namespace that has none of its own.
create table tasker.retention (
  namespace        text primary key,
  -- How long a task is kept after it has finished; null: for ever.
  keep             interval,
  -- How long a quarantined message is kept; null: for ever. Those of the common queues have
  -- no namespace: `*` decides.
  keep_quarantine  interval,
  -- Only whoever writes an archive may remove.
  archive          boolean not null default false,
  constraint retention_keeps_an_hour_at_least check (keep >= interval '1 h' and keep_quarantine >= interval '1 h')
);

create function tasker.set_retention(
  namespace text, keep interval default null, keep_quarantine interval default null, archive boolean default false,
  actor text default session_user
) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
begin
  if not tasker.is_owner() then
    raise exception 'namespace: only the owner of the schema sets retention' using errcode = '42501';
  end if;
  if namespace is null or (namespace <> '*' and namespace !~ '^[a-z](_?[a-z0-9])*$') then
    raise exception 'namespace: must match ^[a-z](_?[a-z0-9])*$, or be * for all that have no policy of their own' using errcode = '22023';
  end if;
  if keep < interval '1 h' or keep_quarantine < interval '1 h' then
    raise exception 'keep: must be an hour at least' using errcode = '22023';
  end if;
  if keep is null and keep_quarantine is null then
    delete from tasker.retention r where r.namespace = set_retention.namespace;
  else
    insert into tasker.retention as r (namespace, keep, keep_quarantine, archive)
    values (namespace, keep, keep_quarantine, coalesce(archive, false))
    on conflict on constraint retention_pkey do update
    set keep = excluded.keep, keep_quarantine = excluded.keep_quarantine, archive = excluded.archive;
  end if;
  insert into tasker.audit (subject, action, actor, reason)
  values ('retention ' || namespace, 'retention.set', left(actor, 100),
    format('keep %s, quarantine %s%s', coalesce(justify_hours(keep)::text, 'for ever'), coalesce(justify_hours(keep_quarantine)::text, 'for ever'), case when archive then ', archive' else '' end));
end
$$;

-- Whether a task may go: finished for as long as its namespace's policy says, its spans
-- acknowledged (what ended before the oldest open batch is), and not the child of a task that is
-- still open. (Not clock_timestamp(): a view with a volatile column is never merged into its query.)
create view tasker.task_expiry as
select t.task_uuid, case when o.namespace is null then a.archive else o.archive end as archive,
  coalesce(t.state in ('complete', 'error', 'cancelled', 'resolved_manually')
    and t.finished_at < statement_timestamp() - case when o.namespace is null then a.keep else o.keep end
    and t.finished_at < (select coalesce(min(b.at), 'infinity') from tasker.export_batches b)
    and not exists (select from tasker.tasks p where p.task_uuid = t.parent_task_uuid and p.finished_at is null), false) as expired
from tasker.tasks t
left join tasker.retention o on o.namespace = t.namespace
left join tasker.retention a on a.namespace = '*';

-- No task created later can have expired; null without a policy.
create function tasker.expiry_horizon() returns uuid
language sql stable
set search_path = pg_catalog, pg_temp
as $$ select tasker.uuid7_floor(clock_timestamp() - min(keep)) from tasker.retention $$;

-- Walks the tasks in the order they were created, by index ranges: up to `p_scan` rows are looked
-- at, up to `p_max` expired ones found. `next_after` is where to go on; null when the walk is done.
create function tasker.expired_tasks(p_after uuid, p_scan int, p_max int, p_archiving boolean, out tasks uuid[], out next_after uuid)
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_horizon  uuid := tasker.expiry_horizon();
  v_last     uuid;
  v_seen     bigint;
begin
  tasks := '{}';
  if v_horizon is null then
    return;
  end if;
  with seen as materialized (
    select t.task_uuid, t.finished_at from tasker.tasks t
    where t.task_uuid > p_after and t.task_uuid < v_horizon order by t.task_uuid limit p_scan
  ), expired as (
    select s.task_uuid from seen s join tasker.task_expiry e on e.task_uuid = s.task_uuid
    where s.finished_at is not null and e.expired and (p_archiving or not e.archive)
    order by s.task_uuid limit p_max
  )
  select coalesce((select array_agg(e.task_uuid order by e.task_uuid) from expired e), '{}'),
         (select s.task_uuid from seen s order by s.task_uuid desc limit 1), (select count(*) from seen)
  into tasks, v_last, v_seen;
  next_after := case
    when cardinality(tasks) = p_max then tasks[p_max]
    when v_seen = p_scan then v_last end;
end
$$;

-- Weeks of the log that hold nothing but expired tasks: their tables will be dropped whole, so
-- the rows in them need not be deleted one by one.
create function tasker.log_weeks() returns table (suffix text, from_uuid uuid, to_uuid uuid)
language sql stable
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
as $$
  select w.suffix, tasker.uuid7_floor(w.monday), tasker.uuid7_floor(w.monday + interval '7 days')
  from pg_inherits i join pg_class c on c.oid = i.inhrelid
  cross join lateral (select substring(c.relname from '_[0-9]{8}$') as suffix,
    to_timestamp(substring(c.relname from '[0-9]{8}$'), 'YYYYMMDD') as monday) w
  where i.inhparent = 'tasker.transitions'::regclass and w.suffix is not null
$$;

create function tasker.expired_weeks(p_archiving boolean) returns text[]
language sql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  select coalesce(array_agg(w.suffix), '{}') from tasker.log_weeks() w
  where w.to_uuid <= tasker.expiry_horizon()
    and not exists (select from tasker.task_expiry e where e.task_uuid >= w.from_uuid and e.task_uuid < w.to_uuid
                    and not (e.expired and (p_archiving or not e.archive)))
$$;

-- Everything there is about these tasks, one JSON object each, for an archive.
create function tasker.archive_tasks(p_tasks uuid[]) returns table (line text)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
  select jsonb_build_object('v', 1, 'task', to_jsonb(t), 'template', jsonb_build_object('name', p.name, 'version', p.version),
    'steps', (select coalesce(jsonb_agg(to_jsonb(s) || jsonb_build_object('name', d.name) order by s.step_index), '[]')
              from tasker.steps s left join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
              where s.task_uuid = t.task_uuid),
    'attempts', (select coalesce(jsonb_agg(to_jsonb(a) order by a.claimed_at), '[]') from tasker.attempts a where a.task_uuid = t.task_uuid),
    'transitions', (select coalesce(jsonb_agg(to_jsonb(l) order by l.at, l.entity_uuid, l.version), '[]')
                    from tasker.transitions l where l.task_uuid = t.task_uuid))::text
  from tasker.tasks t join tasker.templates p on p.template_id = t.template_id
  where t.task_uuid = any(p_tasks) order by t.task_uuid
$$;

-- Locks those of the tasks that are still expired and that nobody holds.
create function tasker.lock_expired(p_tasks uuid[], p_archiving boolean) returns uuid[]
language sql
set search_path = pg_catalog, pg_temp
as $$
  select coalesce(array_agg(l.task_uuid), '{}') from (
    select t.task_uuid from tasker.tasks t join tasker.task_expiry e on e.task_uuid = t.task_uuid
    where t.task_uuid = any(p_tasks) and e.expired and (p_archiving or not e.archive)
    order by t.task_uuid for update of t skip locked) l
$$;

-- Removes locked tasks with all that is theirs: every table of this schema with a `task_uuid` but
-- the audit. The log of a week that will be dropped whole is left to the drop.
create function tasker.remove_tasks(p_tasks uuid[], p_weeks text[] default '{}') returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table   text;
  v_logged  uuid[];
  v_removed bigint;
begin
  select coalesce(array_agg(t), '{}') into v_logged from unnest(p_tasks) t
  where not exists (select from tasker.log_weeks() w where w.suffix = any(p_weeks) and t >= w.from_uuid and t < w.to_uuid);
  delete from tasker.idempotency_keys k using tasker.tasks t
  where t.task_uuid = any(p_tasks) and k.namespace = t.namespace and k.key = t.idempotency_key and k.task_uuid = t.task_uuid;
  for v_table in
    select c.relname from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attname = 'task_uuid' and not a.attisdropped
    where c.relnamespace = 'tasker'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition
      and c.relname not in ('audit', 'tasks', 'idempotency_keys') order by c.relname
  loop
    execute format('delete from tasker.%I where task_uuid = any($1)', v_table)
    using case when v_table in ('transitions', 'attempts') then v_logged else p_tasks end;
  end loop;
  delete from tasker.tasks where task_uuid = any(p_tasks);
  get diagnostics v_removed = row_count;
  return v_removed;
end
$$;

-- Drops the weeks of the log that have no task any more. It waits for no lock longer than a
-- blink, since everybody would queue up behind it; the next pass tries again.
create function tasker.drop_empty_weeks() returns int
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
as $$
declare
  v_week    record;
  v_dropped int := 0;
begin
  for v_week in
    select w.* from tasker.log_weeks() w
    where w.to_uuid <= tasker.expiry_horizon()
      and not exists (select from tasker.tasks t where t.task_uuid >= w.from_uuid and t.task_uuid < w.to_uuid)
  loop
    begin
      execute format('drop table tasker.%I, tasker.%I', 'transitions' || v_week.suffix, 'attempts' || v_week.suffix);
      v_dropped := v_dropped + 1;
    exception when lock_not_available then
      return v_dropped;
    end;
  end loop;
  return v_dropped;
end
$$;

-- Quarantined messages past their time, counters summed up, notes about messages long gone, and what
-- killed processes left: a reader of theirs that sleeps would be notified for ever.
create function tasker.tidy(p_max int, out quarantined bigint)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  with old as (
    select q.quarantine_id from tasker.quarantine q
    join tasker.retention r on r.namespace = coalesce(
      (select o.namespace from tasker.retention o where o.namespace = substring(q.queue from '^worker_(.*?)(?:__.*)?$')), '*')
    where q.quarantined_at < clock_timestamp() - r.keep_quarantine
    order by q.quarantine_id limit p_max
  )
  delete from tasker.quarantine q using old where q.quarantine_id = old.quarantine_id;
  get diagnostics quarantined = row_count;
  if exists (select from tasker.counters c where c.at < clock_timestamp() - interval '10 min' group by c.name having count(*) > 100) then
    with gone as (
      delete from tasker.counters c where c.at < clock_timestamp() - interval '10 min' returning c.name, c.n, c.at
    )
    insert into tasker.counters (name, n, at) select g.name, sum(g.n), max(g.at) from gone g group by g.name;
  end if;
  perform tasker.drop_dead_messages(m.queue_name, null, '10 min', 100000)
  from pgmq.meta m where m.queue_name like 'worker\_%';
  delete from tasker.message_failures f where f.last_at < clock_timestamp() - interval '30 days';
  delete from tasker.workers w where w.seen_at < clock_timestamp() - interval '1 h'
    and not exists (select from tasker.due d where d.kind = 'lease' and d.worker = w.worker);
  -- Those of orchestrators say every six hours that they are there.
  delete from tasker.readers r where r.seen_at < clock_timestamp() - interval '1 day'
    and not exists (select from tasker.workers w where w.worker = r.reader);
  delete from tasker.instances i where i.seen_at < clock_timestamp() - interval '1 day'
    and not exists (select from tasker.export_batches b where b.instance = i.instance);
end
$$;

-- The oldest row of each table that grows or drains, for a metric: a cheap look, one index
-- probe or a small table each.
create function tasker.oldest_rows() returns table (what text, oldest_at timestamptz, age_s double precision)
language sql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  select o.what, o.at, extract(epoch from clock_timestamp() - o.at)::float8
  from (
    select 'tasks', (select t.created_at from tasker.tasks t order by t.task_uuid limit 1)
    union all select 'quarantine', (select q.quarantined_at from tasker.quarantine q order by q.quarantine_id limit 1)
    union all select 'export_batches', (select min(b.at) from tasker.export_batches b)
    union all select 'due', (select min(d.due_at) from tasker.due d)
    union all select 'log', (select to_timestamp(('x' || left(replace(min(w.from_uuid::text), '-', ''), 12))::bit(48)::bigint / 1000.0) from tasker.log_weeks() w)
  ) o(what, at)
  where o.at is not null
$$;

revoke all on all functions in schema tasker from public;
