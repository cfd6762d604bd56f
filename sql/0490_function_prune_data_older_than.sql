-- Deletes all that ended before `retention_interval` ago: finished runs with their tasks, steps and messages, archived messages,
-- workers that have been silent for so long; pgflow's own name for it, all in one transaction. What a late callback holds
-- at that moment stays for the next time.
-- Called by: administrators, or a scheduler of theirs. Flowgate's own schedule calls `flowgate.prune`, in small batches.
-- Locks, failure: those of `flowgate.prune`, all of it until commit.
create or replace function pgflow.prune_data_older_than(retention_interval interval)
returns void
language plpgsql
volatile
set search_path = ''
as $$
declare
    v_pruned record;
begin
    loop
        -- Large batches: what this transaction deleted is still in the way of its next search.
        select * into v_pruned from flowgate.prune(prune_data_older_than.retention_interval, 1000000);
        exit when v_pruned.runs = 0 and v_pruned.archived = 0 and v_pruned.workers = 0;
    end loop;
end;
$$;
