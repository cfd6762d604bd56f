-- Who reads the outbox, one row a reader, and whether it sleeps until it is notified.
-- Written by: Flowgate's event readers, when they fall asleep or stay awake. Read by: `flowgate.publish`, which notifies only if
-- some reader sleeps. Failure: see `flowgate.publish`.
--
-- Why: NOTIFY takes one lock of the whole cluster until its transaction has reached the disk, so transactions that notify commit
-- one by one (sql/README.md, "Figures"). Under load a reader looks every few milliseconds anyway and need not be told.
create table if not exists flowgate.reader (
    reader_id uuid primary key,             -- of its Flowgate; the servers that carry that one's clients have it in `flowgate.wake`
    pid       integer not null,             -- of its connection
    asleep    boolean not null
);
