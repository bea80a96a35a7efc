use std::collections::BTreeSet;

use wsgi_wasm_skeleton::{list_written_pages, merge, split};

use crate::sample::Sample;

#[track_caller]
fn assert_no_split(sample: &Sample, reason: &str) {
    let error = format!("{:#}", split(&sample.component()).unwrap_err());
    assert!(error.contains(reason), "{error}");
}

#[track_caller]
fn assert_no_merge(sample: &Sample, reason: &str) {
    let parts = split(&sample.component()).unwrap();
    let error = format!("{:#}", merge(&parts.skeleton).unwrap_err());
    assert!(error.contains(reason), "{error}");
}

#[test]
fn what_can_not_be_split_is_refused_with_the_reason() {
    let sample = Sample::new();
    assert_no_split(&Sample { dylink: false, ..sample }, "shared libraries");
    assert_no_split(&Sample { twice: true, ..sample }, "exactly once");
    assert_no_split(&Sample { second_memory: true, ..sample }, "more than one memory");
    assert_no_split(&Sample { imports_module: true, ..sample }, "core type");
    let refused = |bytes: &[u8]| format!("{:#}", split(bytes).unwrap_err());
    assert!(refused(b"").contains("not a component"));
    assert!(refused(b"\0asm\x01\0\0\0").contains("not a component"));
    assert!(refused(b"\0asm\x0d\0\x01\0").contains("shared libraries"));
}

#[test]
fn what_can_not_be_merged_is_refused_with_the_reason() {
    let sample = Sample::new();
    assert_no_merge(&Sample { start: true, ..sample }, "start function");
    assert_no_merge(&Sample { library_twice: true, ..sample }, "more than once");
    assert_no_merge(&Sample { forged_shim: true, ..sample }, "pass its arguments on");
    assert_no_merge(&Sample { no_filler: true, ..sample }, "not instantiated");
    assert_no_merge(&Sample { circle: true, ..sample }, "in a circle");
    assert_no_merge(&Sample { missing_export: true, ..sample }, "not valid");
    let refused = |bytes: &[u8]| format!("{:#}", merge(bytes).unwrap_err());
    assert!(refused(b"").contains("not valid"));
    assert!(refused(b"\0asm\x0d\0\x01\0").contains("no tenant"));
    assert!(refused(&Sample::new().component()).contains("a memory of its own"));
}

#[test]
fn a_list_of_written_pages_is_not_trusted() {
    let refused = |pages: &[u8]| {
        let mut component = Sample::new().component();
        let section = [b"\x0dwritten-pages", pages].concat();
        component.extend([0, u8::try_from(section.len()).unwrap()]);
        component.extend(section);
        format!("{:#}", split(&component).unwrap_err())
    };
    assert!(refused(&[1]).contains("not one"));
    assert!(refused(&[2, 0, 0, 0, 1, 0, 0, 0]).contains("not one"));
    assert!(refused(&[1, 0, 0, 0, 1, 0, 0, 0]).contains("not one"));
    assert!(refused(&[32, 0, 0, 0]).contains("outside of its memory"));
    assert!(refused(&[0xff; 4]).contains("outside of its memory"));
    let mut component = Sample { pages: 1000, ..Sample::new() }.component();
    list_written_pages(&mut component, &(0..5000).collect::<BTreeSet<_>>());
    assert!(split(&component).is_ok(), "as many as may be");
}

#[test]
fn no_damage_makes_it_panic() {
    let mut whole = Sample::new().component();
    list_written_pages(&mut whole, &BTreeSet::from([0, 2]));
    let skeleton = split(&whole).unwrap().skeleton;
    for end in 0..whole.len() {
        assert!(split(&whole[..end]).is_err() || end > whole.len() / 2, "cut off at {end}");
    }
    for (bytes, is_whole) in [(&whole, true), (&skeleton, false)] {
        for place in 8..bytes.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff, bytes[place] ^ 1, bytes[place].wrapping_add(1)] {
                let mut damaged = bytes.clone();
                damaged[place] = value;
                if !is_whole {
                    let _ = merge(&damaged);
                } else if let Ok(parts) = split(&damaged) {
                    let _ = merge(&parts.skeleton);
                }
            }
        }
    }
}
