-- Orphans from $2 on, oldest first, by the index on `at`: up to $3 of them become the batches of $1.
with orphan as (
  select b.batch_id from tasker.export_batches b
  where b.at >= coalesce($2, '-infinity'::timestamptz)
    and (b.instance is null or b.instance <> all ($1::uuid || array(
           select i.instance from tasker.instances i where i.seen_at > clock_timestamp() - interval '15 s')))
  order by b.at limit $3 for update skip locked
)
update tasker.export_batches b set instance = $1 from orphan o where b.batch_id = o.batch_id
returning b.batch_id, b.task_uuids, b.at
