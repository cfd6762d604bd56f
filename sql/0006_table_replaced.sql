-- What was there before an object of ours took its place, as SQL that makes it again; `uninstall.sql` runs it.
-- Written by: `0039_check_send.sql`. Read by: `0041_grant_send.sql`, `uninstall.sql`. Failure: aborts the install.
create table if not exists flowgate.replaced (
    object     text primary key,
    definition text not null,
    owner      text not null,
    -- Who could execute it; null: everybody.
    grantees   text[]
);
