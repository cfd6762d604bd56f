//! Lists `sql/NNNN_*.sql` in apply order for `src/schema.rs`, each with its text, so that adding a file is all it takes.

use std::env;
use std::fmt::Write;
use std::fs;
use std::path::Path;

fn main() {
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("sql");
    println!("cargo::rerun-if-changed={}", folder.display());
    println!("cargo::rerun-if-changed=build.rs");
    let entries =
        fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut names: Vec<String> = entries
        .map(|entry| {
            entry
                .expect("a readable sql/")
                .file_name()
                .into_string()
                .expect("names in ASCII")
        })
        .filter(|name| name.ends_with(".sql") && name != "lock.sql" && name != "uninstall.sql")
        .collect();
    names.sort();
    let number = |name: &str| name.split_once('_').map(|(number, _)| number.to_owned());
    for name in &names {
        let numbered = number(name)
            .is_some_and(|n| n.len() == 4 && n.bytes().all(|digit| digit.is_ascii_digit()));
        assert!(numbered, "sql/{name}: name it NNNN_<kind>_<name>.sql");
    }
    for pair in names.windows(2) {
        assert!(
            number(&pair[0]) != number(&pair[1]),
            "sql/{} and sql/{} share a number",
            pair[0],
            pair[1]
        );
    }
    let mut list = String::from("&[\n");
    for name in names {
        let path = folder.join(&name);
        writeln!(list, "    ({name:?}, include_str!({path:?})),").expect("a String takes all");
    }
    list.push_str("]\n");
    let out = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("sql_files.rs");
    fs::write(&out, list).unwrap_or_else(|error| panic!("{}: {error}", out.display()));
}
