use std::collections::BTreeSet;

use wasmtime::component::{Component, Linker};
use wasmtime::{Engine, Instance, Module, Store};
use wsgi_wasm_skeleton::{TENANT, list_written_pages, merge, split};

use crate::sample::Sample;

/// Calls `run` of a fresh instance with each of `arguments`; none is a trap.
fn run(component: &[u8], tenant: Option<&[u8]>, arguments: &[u32]) -> Vec<Option<u32>> {
    let engine = Engine::default();
    let mut linker = Linker::<()>::new(&engine);
    linker.root().func_wrap("double", |_, (x,): (u32,)| Ok((x.wrapping_mul(2),))).unwrap();
    linker.root().func_wrap("name", |_, (): ()| Ok(("Brian".to_owned(),))).unwrap();
    if let Some(tenant) = tenant {
        linker.root().module(TENANT, &Module::new(&engine, tenant).unwrap()).unwrap();
    }
    let component = Component::new(&engine, component).unwrap();
    let mut store = Store::new(&engine, ());
    let instance = linker.instantiate(&mut store, &component).unwrap();
    let run = instance.get_typed_func::<(u32,), (u32,)>(&mut store, "run").unwrap();
    arguments.iter().map(|x| run.call(&mut store, (*x,)).ok().map(|(result,)| result)).collect()
}

/// What `run` returns the first time: the name's first byte and length, the
/// doubled argument, the doubled counter, the data, what is called through the
/// table, and the stack pointer.
fn expected_sum(sample: &Sample, x: u32) -> u32 {
    let sum = i32::from(b'B') + 5 + 2 * sample.counter + sample.data + 1_000_000 + sample.stack - 16;
    u32::try_from(sum).unwrap() + 2 * x
}

#[test]
fn all_three_ways_do_the_same() {
    let one = Sample::new();
    let other = Sample { data: 3, stack: 1 << 16, counter: 40, pages: 9, ..Sample::new() };
    for sample in [one, other] {
        let whole = sample.component();
        let parts = split(&whole).unwrap();
        let merged = merge(&parts.skeleton).unwrap();
        // The last calls show what the ones before have left, and a trap.
        let arguments = [1, 2, 1, 0, 1];
        let results = run(&whole, None, &arguments);
        assert_eq!(results[0], Some(expected_sum(&sample, 1)));
        assert_eq!(results[3], None);
        assert_eq!(run(&parts.skeleton, Some(&parts.tenant), &arguments), results);
        assert_eq!(run(&merged, Some(&parts.tenant), &arguments), results);
    }
}

#[test]
fn apps_share_a_skeleton_and_not_their_state() {
    let one = split(&Sample::new().component()).unwrap();
    let other = Sample { data: 1, stack: 32_768, counter: 0, pages: 70, ..Sample::new() };
    let other_parts = split(&other.component()).unwrap();
    assert_eq!(one.skeleton, other_parts.skeleton);
    assert_ne!(one.tenant, other_parts.tenant);
    // The state of one app and the skeleton that came with another.
    let merged = merge(&one.skeleton).unwrap();
    assert_eq!(run(&merged, Some(&other_parts.tenant), &[1]), [Some(expected_sum(&other, 1))]);
}

#[test]
fn a_merged_skeleton_has_few_modules_constants_and_names() {
    let parts = split(&Sample::new().component()).unwrap();
    let merged = merge(&parts.skeleton).unwrap();
    assert_eq!(merge(&parts.skeleton).unwrap(), merged, "the same input gives the same output");
    let (mut modules, mut globals, mut names) = (0, Vec::new(), Vec::new());
    for payload in wasmparser::Parser::new(0).parse_all(&merged) {
        match payload.unwrap() {
            wasmparser::Payload::ModuleSection { .. } => modules += 1,
            wasmparser::Payload::GlobalSection(section) => globals.push(section.count()),
            wasmparser::Payload::CustomSection(section) => {
                if let wasmparser::KnownCustom::Name(section) = section.as_known() {
                    for subsection in section {
                        if let wasmparser::Name::Function(map) = subsection.unwrap() {
                            names.extend(map.into_iter().map(|naming| naming.unwrap().name.to_owned()));
                        }
                    }
                }
            }
            _ => {}
        }
    }
    assert_eq!(modules, 2, "the code, and the allocators");
    assert_eq!(globals, [2], "the stack pointer and the counter; all others are constants");
    // The calls to the host, then what is reached, in order.
    assert_eq!(names, ["double", "name", "count", "in_the_table", "cabi_realloc", "run_the_sample"]);
}

/// The memory of a fresh instance of a tenant module.
fn memory(tenant: &[u8]) -> Vec<u8> {
    let engine = Engine::default();
    let mut store = Store::new(&engine, ());
    let instance = Instance::new(&mut store, &Module::new(&engine, tenant).unwrap(), &[]).unwrap();
    instance.get_memory(&mut store, "memory").unwrap().data(&store).to_vec()
}

#[test]
fn pages_that_are_written_to_stay_as_they_are() {
    let sample = Sample::new();
    let plain = split(&sample.component()).unwrap();
    assert_eq!(plain.first_page, 0);
    let mut listing = sample.component();
    // The last page of the memory is the 31st.
    list_written_pages(&mut listing, &BTreeSet::from([0, 2, 31]));
    let parts = split(&listing).unwrap();
    assert_eq!(parts.skeleton, plain.skeleton, "the list is the app's own");
    assert_ne!(parts.tenant, plain.tenant);
    let expected = memory(&plain.tenant);
    assert_eq!(expected[8190..8195], [4, 5, 6, 7, 3]);
    assert!(memory(&parts.tenant) == expected);
    let merged = merge(&parts.skeleton).unwrap();
    assert_eq!(run(&merged, Some(&parts.tenant), &[1]), [Some(expected_sum(&sample, 1))]);
}
