-- How far maps have come. A map's step waits while its items run as steps of their own; these
-- rows are written under the lock of their task, and only by tasks that have a map.
create table tasker.maps (
  task_uuid        uuid not null,
  step_uuid        uuid not null,
  items            int not null,
  next_item        int not null,
  remaining_items  int not null,
  failed_items     int not null default 0,
  primary key (task_uuid, step_uuid),
  constraint maps_counts_fit check (
    next_item between 0 and items and remaining_items between 0 and items and failed_items between 0 and items)
) with (fillfactor = 50);

-- The list that a map runs over, in pieces, so that creating a few items reads a few of them.
create table tasker.map_items (
  task_uuid  uuid not null,
  step_uuid  uuid not null,
  chunk      int not null,
  items      jsonb not null,
  primary key (task_uuid, step_uuid, chunk)
);
