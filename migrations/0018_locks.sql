-- Locks that others hold. Whoever may call a function may call it in a transaction and leave that open:
-- the rows it wrote stay locked until it ends. What all share waits for no such row: it leaves it out,
-- or gives up after a moment, and comes back to it.

-- Who holds locks on tables of ours for longer than `p_older`, and since when: who is in the way when
-- work is put off. Never the text of a query. What the session's role hides (`since`, `state` and
-- `client`, without `pg_read_all_stats`) is null; its transaction is listed then however young it is.
create function tasker.lock_holders(p_older interval default '1 s')
returns table (
  pid int, user_name text, application_name text, client text, since timestamptz, state text,
  -- It has only read: then nothing but a change of the tables themselves waits for it.
  only_reads boolean, tables text[], waiting int, transaction text
)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
  select a.pid, a.usename::text, a.application_name, host(a.client_addr), a.xact_start, a.state,
    h.only_reads, h.tables,
    (select count(*)::int from pg_locks w where not w.granted and a.pid = any(pg_blocking_pids(w.pid))),
    h.virtualtransaction
  from (
    select l.pid, l.virtualtransaction, bool_and(l.mode = 'AccessShareLock') as only_reads,
      array_agg(distinct n.nspname || '.' || c.relname) as tables
    from pg_locks l
    join pg_class c on c.oid = l.relation and c.relkind in ('r', 'p')
    join pg_namespace n on n.oid = c.relnamespace and n.nspname in ('tasker', 'pgmq')
    where l.locktype = 'relation' and l.granted and l.pid <> pg_backend_pid()
      and l.database = (select d.oid from pg_database d where d.datname = current_database())
    group by l.pid, l.virtualtransaction
  ) h
  join pg_stat_activity a on a.pid = h.pid
  -- Autovacuum is no user, and gives way by itself.
  where a.usename is not null
    and coalesce(a.xact_start < clock_timestamp() - p_older, true)
  order by h.only_reads, a.xact_start nulls last, a.pid
$$;

-- Lets messages be read again later, because of a lock that somebody else holds: after about as long
-- again as they have waited, five seconds or so at most, each at a time of its own.
create function tasker.put_off(p_queue text, p_msg_ids bigint[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  execute format($q$
    update pgmq.%1$I q
    set vt = clock_timestamp() + least(greatest(clock_timestamp() - q.enqueued_at, interval '100 ms'), interval '5 s') * (0.75 + random() / 2),
        read_ct = greatest(q.read_ct - 1, 0)
    where q.msg_id = any(array(select m.msg_id from pgmq.%1$I m where m.msg_id = any($1) for update skip locked))
  $q$, 'q_' || p_queue) using p_msg_ids;
end
$$;

-- As before, but a message that somebody has locked stays hidden for as long as its reading said.
create or replace function tasker.put_back(p_queue text, p_msg_ids bigint[], p_delay interval) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  execute format($q$
    update pgmq.%1$I q set vt = clock_timestamp() + $2, read_ct = greatest(q.read_ct - 1, 0)
    where q.msg_id = any(array(select m.msg_id from pgmq.%1$I m where m.msg_id = any($1) for update skip locked))
  $q$, 'q_' || p_queue) using p_msg_ids, p_delay;
end
$$;

-- As before, but a message that somebody has locked is left to the next who reads it.
create or replace function tasker.quarantine_messages(p_queue text, p_msg_ids bigint[], p_reasons text[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  execute format($q$
    with bad as (
      select b.msg_id, b.reason from unnest($2, $3) as b(msg_id, reason)
    ), taken as (
      delete from pgmq.%1$I q using bad b
      where q.msg_id = b.msg_id
        and q.msg_id = any(array(select m.msg_id from pgmq.%1$I m where m.msg_id = any($2) for update skip locked))
      returning q.msg_id, q.read_ct, q.enqueued_at, q.message, q.headers, b.reason
    ), failed as (
      delete from tasker.message_failures f using taken t where f.queue = $1 and f.msg_id = t.msg_id
      returning f.msg_id, f.failures
    )
    insert into tasker.quarantine (queue, msg_id, read_ct, failures, reason, message, headers, enqueued_at)
    select $1, t.msg_id, t.read_ct, coalesce(f.failures, 1), t.reason, t.message, t.headers, t.enqueued_at
    from taken t left join failed f on f.msg_id = t.msg_id
  $q$, 'q_' || p_queue) using p_queue, p_msg_ids, p_reasons;
end
$$;

-- As before, but a limit that somebody has locked (one that is being changed, or another who admits
-- under it) is not in the answer, and so lets nothing through for now.
create or replace function tasker.lock_limits(
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

  v_ids := array(select l.limit_id from tasker.limits l where l.name = any(p_names) order by l.limit_id for no key update skip locked);

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

-- The timeline that this server writes, or null where that is not told. A standby that is promoted
-- begins another; a server that restarts does not.
create function tasker.present_timeline() returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return left(pg_walfile_name(pg_current_wal_lsn()), 8);
exception when feature_not_supported or insufficient_privilege or undefined_function or object_not_in_prerequisite_state then
  return null;
end
$$;

-- Since when this database is known to be on its timeline. The row is replicated like any other, so
-- that after a promotion it names the timeline before.
create table tasker.timeline (
  one       boolean primary key default true,
  timeline  text not null,
  seen_at   timestamptz not null default clock_timestamp(),
  constraint timeline_is_one_row check (one)
);
insert into tasker.timeline (timeline) select t from tasker.present_timeline() t where t is not null;

-- As before, but:
-- A promotion of a standby frees the locks of all workers as a restart does, and the start of the
-- server does not tell it: the timeline does. What was said before it was seen counts no more.
-- A worker whose row somebody has locked is saying hello, or somebody has its row in hand: its lease
-- decides. A step that somebody has locked is left to its lease, too.
create or replace function tasker.look_for_dead_workers(p_suspects text[], p_keys bigint[])
returns table (held boolean, overdue boolean, worker text, lock_key bigint, dead boolean)
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
  v            record;
  v_free       boolean := false;
  v_overdue    boolean;
  v_timeline   text := tasker.present_timeline();
  v_known      tasker.timeline;
  v_believable timestamptz := pg_postmaster_start_time();
begin
  select t.* into v_known from tasker.timeline t;
  if v_timeline is distinct from v_known.timeline and v_timeline is not null then
    insert into tasker.timeline as t (timeline) values (v_timeline)
    on conflict on constraint timeline_pkey do update set timeline = excluded.timeline, seen_at = excluded.seen_at
    where t.timeline <> excluded.timeline;
    v_believable := clock_timestamp();
  else
    v_believable := greatest(v_believable, v_known.seen_at);
  end if;

  v_overdue := exists (select from tasker.due d where d.kind = 'lease' and d.due_at <= clock_timestamp());
  for v in
    select w.worker, w.lock_key, exists (
        select from unnest(p_suspects, p_keys) s(worker, lock_key) where (s.worker, s.lock_key) = (w.worker, w.lock_key)
      ) as suspected
    from tasker.workers w
    -- What was said before is about a session that has ended with its server.
    where w.lock_key is not null and w.seen_at > v_believable
      and exists (select from tasker.due d where d.kind = 'lease' and d.worker = w.worker)
    order by w.worker
  loop
    continue when not pg_try_advisory_xact_lock_shared(v.lock_key);
    if v.suspected then
      perform from tasker.workers w where w.worker = v.worker and w.lock_key = v.lock_key for update skip locked;
      continue when not found;
    end if;
    v_free := true;
    if v.suspected then
      update tasker.steps s set lease_expires_at = least(s.lease_expires_at, clock_timestamp())
      where s.step_uuid = any(array(
          select c.step_uuid from tasker.steps c
          where c.step_uuid in (
              select u from tasker.due d cross join lateral unnest(d.step_uuids) u where d.kind = 'lease' and d.worker = v.worker)
            and c.state = 'in_progress' and c.claimed_by = v.worker
          order by c.step_uuid for no key update skip locked));
      update tasker.due d set due_at = clock_timestamp()
      where d.due_id in (select l.due_id from tasker.due l where l.kind = 'lease' and l.worker = v.worker for update skip locked);
      -- Nothing more is sent on its account. If it lives after all, its next hello says so.
      delete from tasker.readers r
      where r.reader = v.worker
        and r.queue = any(array(select o.queue from tasker.readers o where o.reader = v.worker for update skip locked));
      delete from tasker.workers w where w.worker = v.worker;
    end if;
    return query select true, v_overdue or v.suspected, v.worker, v.lock_key, v.suspected;
  end loop;
  if not v_free then
    return query select exists (select from tasker.due d where d.kind = 'lease'), v_overdue, null::text, null::bigint, false;
  end if;
end
$$;

-- Makes the weeks of the log that are missing; answers how many, or -1 if a lock was in the way.
--
-- `create table … partition of` would lock the log against everybody, and wait for whoever reads it:
-- a table is made by itself, and attached. That stops nobody but readers of the default part, which is
-- meant to stay empty, and it waits for them for a blink only, since others queue up behind it: who
-- calls this tries again soon.
create or replace function tasker.ensure_partitions(weeks_ahead int default 4) returns int
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms'
as $$
declare
  v_week timestamptz := date_trunc('week', clock_timestamp() at time zone 'UTC') at time zone 'UTC';
  v_made int := 0;
  v_from timestamptz;
  v_name text;
  v_part record;
begin
  -- "taskerP" in ASCII: one at a time, and the others need not wait for the same.
  if not pg_try_advisory_xact_lock(x'007461736b657250'::bigint) then
    return 0;
  end if;
  for i in 0..weeks_ahead loop
    v_from := v_week + make_interval(weeks => i);
    v_name := to_char(v_from at time zone 'UTC', '"_"YYYYMMDD');
    continue when to_regclass('tasker.transitions' || v_name) is not null and to_regclass('tasker.attempts' || v_name) is not null;
    for v_part in select * from (values ('transitions', ''), ('attempts', ' with (fillfactor = 45)')) p(parent, options) loop
      continue when to_regclass('tasker.' || v_part.parent || v_name) is not null;
      execute format('create table tasker.%I (like tasker.%I including all)%s', v_part.parent || v_name, v_part.parent, v_part.options);
      execute format('alter table tasker.%I attach partition tasker.%I for values from (%L) to (%L)', v_part.parent, v_part.parent || v_name,
        tasker.uuid7_floor(v_from), tasker.uuid7_floor(v_from + interval '1 week'));
    end loop;
    v_made := v_made + 1;
  end loop;
  return v_made;
exception when lock_not_available then
  -- What was made above is undone with it.
  return -1;
end
$$;

-- As before, but a row that somebody has locked (a worker that says hello, a message that is sent
-- again) is left to the next pass.
create or replace function tasker.tidy(p_max int, out quarantined bigint)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  with old as (
    select q.quarantine_id from tasker.quarantine q
    join tasker.retention r on r.namespace = coalesce(
      (select o.namespace from tasker.retention o where o.namespace = substring(q.queue from '^worker_(.*?)(?:__.*)?$')), '*')
    where q.quarantined_at < clock_timestamp() - r.keep_quarantine
    order by q.quarantine_id limit p_max for update of q skip locked
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
  delete from tasker.workers w where w.worker = any(array(
    select o.worker from tasker.workers o where o.seen_at < clock_timestamp() - interval '1 h'
      and not exists (select from tasker.due d where d.kind = 'lease' and d.worker = o.worker)
    for update skip locked));
  -- Those of orchestrators say every six hours that they are there.
  delete from tasker.readers r where (r.queue, r.reader) in (
    select o.queue, o.reader from tasker.readers o where o.seen_at < clock_timestamp() - interval '1 day'
      and not exists (select from tasker.workers w where w.worker = o.reader)
    for update skip locked);
  delete from tasker.instances i where i.seen_at < clock_timestamp() - interval '1 day'
    and not exists (select from tasker.export_batches b where b.instance = i.instance);
end
$$;

revoke all on function tasker.lock_holders, tasker.put_off, tasker.present_timeline from public;
