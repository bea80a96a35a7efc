use std::num::NonZero;
use std::path::Path;
use std::thread::available_parallelism;

use serde_json::Value;

use crate::harness::{Connection, Server, guest, run, wsgi_wasm};

/// A server with this configuration, which ends without waiting for what is running.
fn serve(directory: &Path, config: &str) -> Server {
    let path = directory.join("wsgi-wasm.toml");
    std::fs::write(&path, config).unwrap();
    Server::spawn(wsgi_wasm().args(["serve", "--bind", "127.0.0.1:0", "--grace", "0s", "--config"]).arg(path))
}

/// The parts of the processors' time that two tenants get whose requests never
/// end: with these settings, and so many requests for each processor.
fn parts(settings: [&str; 2], requests: [usize; 2]) -> [f64; 2] {
    let processors = available_parallelism().map_or(1, NonZero::get).min(8);
    let directory = tempfile::tempdir().unwrap();
    let app = guest("hostile");
    let tenants = ["a", "b"].into_iter().zip(settings).map(|(name, settings)| {
        format!(
            "[[tenant]]\nname = \"{name}\"\napp = \"{}\"\nhosts = [\"{name}\"]\n{settings}\n",
            app.display()
        )
    });
    let config = format!(
        "server.control = \"unix:control.sock\"\n[defaults]\ninstances = {{ max = 64 }}\n\
         limits = {{ timeout = \"5m\" }}\n{}",
        tenants.collect::<String>()
    );
    let server = serve(directory.path(), &config);
    let control = format!("unix:{}", directory.path().join("control.sock").display());
    let used = || -> [f64; 2] {
        let list = run(wsgi_wasm().args(["ctl", "--control", &control, "list", "--json"])).success().stdout;
        let list: Value = serde_json::from_str(&list).unwrap();
        ["a", "b"].map(|name| {
            let tenant = list.as_array().unwrap().iter().find(|tenant| tenant["name"] == name).unwrap();
            tenant["cpu_seconds"].as_f64().unwrap()
        })
    };
    // Waits until both have had so much together.
    let until = |sum: f64| loop {
        let now = used();
        if now[0] + now[1] >= sum {
            return now;
        }
    };
    let open: Vec<Connection> = ["b", "a"]
        .into_iter()
        .zip([requests[1], requests[0]])
        .flat_map(|(name, count)| std::iter::repeat_n(name, count * processors))
        .map(|name| {
            let mut connection = server.connect();
            connection.send(format!("GET /spin HTTP/1.1\r\nHost: {name}\r\n\r\n"));
            connection
        })
        .collect();
    let first = until(1.0);
    let last = until(first[0] + first[1] + 3.0);
    drop(open);
    let [a, b] = [last[0] - first[0], last[1] - first[1]];
    [a / (a + b), b / (a + b)]
}

#[test]
fn a_tenants_share_does_not_depend_on_its_number_of_requests() {
    let parts = parts(["", ""], [1, 6]);
    assert!((0.4..0.6).contains(&parts[0]), "{parts:?}");
}

#[test]
fn a_tenants_share_follows_its_weight() {
    let parts = parts(["weight = 1", "weight = 4"], [6, 1]);
    assert!((0.1..0.3).contains(&parts[0]), "{parts:?}");
}

#[test]
fn a_tenant_without_budget_gets_a_lower_share() {
    let parts = parts(["", "limits = { cpu_per_minute = \"100ms\" }"], [1, 6]);
    assert!(parts[1] < 0.25, "{parts:?}");
}

/// What is behind the name in `/proc/PID/stat`, as far as it is numbers.
fn fields(stat: &str) -> Vec<i64> {
    let (_, fields) = stat.rsplit_once(')').unwrap();
    fields.split_ascii_whitespace().map(|field| field.parse().unwrap_or(0)).collect()
}

/// Places in [`fields`], see `proc_pid_stat(5)`, and a policy.
const NICENESS: usize = 16;
const POLICY: usize = 38;
const SCHED_BATCH: i64 = 3;

#[test]
fn who_is_ahead_works_on_files_with_what_others_leave() {
    let directory = tempfile::tempdir().unwrap();
    let (app, data) = (guest("hostile"), directory.path().join("data"));
    std::fs::create_dir(&data).unwrap();
    let config = format!(
        "[[tenant]]\nname = \"a\"\napp = {app:?}\nhosts = [\"a\"]\ndata = {{ path = {data:?} }}\n\
         [[tenant]]\nname = \"b\"\napp = {app:?}\nhosts = [\"b\"]\n"
    );
    let server = serve(directory.path(), &config);
    let own = fields(&std::fs::read_to_string("/proc/self/stat").unwrap())[NICENESS];
    // Those that work on files beside the ones of the runtimes: how nice, and of which policy.
    let threads = || -> Vec<(i64, i64)> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", server.id())).unwrap();
        let read = |name: &str, task: &Path| std::fs::read_to_string(task.join(name)).ok();
        tasks
            .map(|task| task.unwrap().path())
            .filter(|task| read("comm", task).is_some_and(|name| name.trim() == "files"))
            .filter_map(|task| read("stat", &task))
            .map(|stat| (fields(&stat)[NICENESS], fields(&stat)[POLICY]))
            .collect()
    };
    let ask = |host: &str, path: &str| {
        let mut connection = server.connect();
        connection.send(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        connection
    };
    // Nobody else wants anything.
    assert_eq!(ask("a", "/churn-data?20").read_response("GET").status, 200);
    assert_eq!(threads(), []);
    let found = (0..100).any(|_| {
        assert_eq!(ask("b", "/hello").read_response("GET").status, 200);
        let mut asked: Vec<_> = (0..12).map(|_| ask("a", "/churn-data?20")).collect();
        asked.iter_mut().for_each(|one| assert_eq!(one.read_response("GET").status, 200));
        !threads().is_empty()
    });
    assert!(found, "no thread of the kind");
    assert!(threads().iter().all(|thread| *thread == ((own + 19).min(19), SCHED_BATCH)), "{:?}", threads());
    server.finish();
}

#[test]
fn threads_have_the_places_that_their_work_needs() {
    let server = Server::start("behaviours", &[]);
    assert_eq!(server.get("/hello").status, 200);
    let niceness = fields(&std::fs::read_to_string("/proc/self/stat").unwrap())[NICENESS];
    // Since when it gives slices as asked for; and it shows them only if it was built so.
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut version = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let has_slices = (version.next(), version.next()) >= (Some(6), Some(12));
    let (mut foreground, mut background, mut slices) = (Vec::new(), 0, Vec::new());
    for task in std::fs::read_dir(format!("/proc/{}/task", server.id())).unwrap() {
        let task = task.unwrap().path();
        let read = |name: &str| std::fs::read_to_string(task.join(name)).unwrap();
        let stat = fields(&read("stat"));
        let status = read("status");
        let processors = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:\t")).unwrap();
        match read("comm").trim() {
            "background" => {
                assert_eq!(stat[NICENESS], niceness + 8);
                assert_eq!(stat[POLICY], SCHED_BATCH);
                background += 1;
            }
            "tokio-rt-worker" => {
                assert_eq!(stat[NICENESS], niceness);
                foreground.push(processors.to_owned());
                let scheduled = std::fs::read_to_string(task.join("sched")).unwrap_or_default();
                let slice = scheduled.lines().find_map(|line| line.strip_prefix("se.slice"));
                slices.extend(slice.map(|slice| slice.trim_start_matches([' ', ':']).to_owned()));
            }
            _ => {}
        }
    }
    if !has_slices || slices.is_empty() || niceness != 0 {
        eprintln!(
            "not looked at: slices of the kernel, for it has or shows none, or we are not as nice as usual"
        );
    } else {
        assert!(slices.iter().all(|slice| slice == "100000"), "{slices:?} ns");
    }
    assert!(background > 0);
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let all = own.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:\t")).unwrap();
    let processors = available_parallelism().unwrap().get();
    if processors < 2 || all != format!("0-{}", processors - 1) {
        eprintln!(
            "not looked at: which processors threads stay on, for a quota leaves less than all of them"
        );
    } else {
        for processor in 0..processors {
            assert!(foreground.contains(&processor.to_string()), "{foreground:?}");
        }
    }
    server.finish();
}
