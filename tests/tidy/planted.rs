//! The rules on snippets that break them, and on ones that only look so.

use crate::rules::{checked, head, layers, map, sizes, unsafe_code, words_not_here};
use crate::source::{Source, blanked};
use std::path::Path;

fn source(path: &str, text: &str) -> Source {
    Source::new(Path::new(path), text.to_owned())
}

fn breaks(rule: fn(&Source) -> Vec<String>, path: &str, text: &str) -> usize {
    rule(&source(path, text)).len()
}

#[test]
fn strings_and_comments_are_no_code() {
    let cases = [
        ("a // unsafe\nb", "a          \nb"),
        ("a /* x /* y */ z */ b", "a                   b"),
        ("f(\"un\\\"safe\")", "f(          )"),
        ("break; r# \"a\"", "break; r#    "),
        ("r#\"a\"b\"# c", "         c"),
        ("br\"\\\" c", "      c"),
        ("'\"' 'a 'b' '\\''", "    'a         "),
        ("for \"é\" x", "for      x"),
        ("&'static str", "&'static str"),
        ("number\"x\"", "number   "),
    ];
    for (text, code) in cases {
        assert_eq!(blanked(text), code, "{text}");
    }
}

#[test]
fn long_functions_files_and_lines_are_found() {
    let function = |lines: usize| format!("fn f() {{\n{}}}\n", "    a();\n".repeat(lines - 2));
    assert_eq!(breaks(sizes, "src/base/a.rs", &function(70)), 0);
    assert_eq!(breaks(sizes, "src/base/a.rs", &function(71)), 1);
    let hidden =
        format!("fn f() {{ // }}\n let a = \"}}\"; let b = '}}';\n{}}}\n", "\n".repeat(70));
    assert_eq!(breaks(sizes, "src/base/a.rs", &hidden), 1, "braces in strings close nothing");
    let generic = format!(
        "fn f<F: Fn(u8) -> [u8; 2]>(f: F)\nwhere\n    F: Copy,\n{{\n{}}}\n",
        "    f(1);\n".repeat(66)
    );
    assert_eq!(breaks(sizes, "src/base/a.rs", &generic), 1);
    assert_eq!(breaks(sizes, "src/base/a.rs", &"a\n".repeat(800)), 0);
    assert_eq!(breaks(sizes, "src/base/a.rs", &"a\n".repeat(801)), 1);
    assert_eq!(breaks(sizes, "src/base/a.rs", &"é".repeat(100)), 0);
    assert_eq!(breaks(sizes, "src/base/a.rs", &"é".repeat(101)), 1);
}

#[test]
fn parameters_are_counted() {
    let five =
        "fn f(&mut self, a: A<B, C>, b: (D, E), c: fn(u8, u8) -> u8, d: [u8; 4], e: &str) {}";
    assert_eq!(breaks(sizes, "src/base/a.rs", five), 0);
    let six = five.replace("e: &str", "e: &str, f: u8,");
    assert_eq!(breaks(sizes, "src/base/a.rs", &six), 1);
    let of_trait = format!("impl T for U {{\n{six}\n}}\n{five}");
    assert_eq!(breaks(sizes, "src/base/a.rs", &of_trait), 0, "the trait says so");
    let after_trait = format!("impl T for U {{\n}}\n{six}");
    assert_eq!(breaks(sizes, "src/base/a.rs", &after_trait), 1);
    let trait_method = "trait T { fn f(a: A, b: A, c: A, d: A, e: A, f: A); }";
    assert_eq!(breaks(sizes, "src/base/a.rs", trait_method), 0, "nobody has written that body");
    assert_eq!(breaks(sizes, "src/base/a.rs", "fn f<T: Fn(u8, u8, u8, u8, u8, u8)>(t: T) {}"), 0);
}

#[test]
fn imports_that_point_upwards_or_sideways_are_found() {
    let bad = [
        ("src/base/a.rs", "use crate::io::disk;"),
        ("src/qos/a.rs", "use crate::metrics::Histogram;"),
        ("src/flash/a.rs", "use crate::{base::units, vhost::{self, Server}};"),
        ("src/vhost/deep/a.rs", "fn f() { crate::control::start() }"),
        ("src/novel/a.rs", "use crate::base::units;"),
    ];
    for (path, text) in bad {
        assert_eq!(breaks(layers, path, text), 1, "{path}: {text}");
    }
    let good = [
        ("src/qos/a.rs", "use crate::base::clock::Nanos; use crate::qos::Limits;"),
        ("src/base/a.rs", "// crate::control\nlet a = \"crate::control\";"),
        ("src/control/a.rs", "use crate::{base, flash, vhost};"),
        ("src/main.rs", "use vflash::control;"),
        ("tools/vflash/src/main.rs", "use crate::control::api;"),
        ("src/base/a.rs", "use crate::error::{Error};"),
    ];
    for (path, text) in good {
        assert_eq!(breaks(layers, path, text), 0, "{path}: {text}");
    }
}

#[test]
fn a_map_that_tells_another_story_is_found() {
    let lib = include_str!("../../src/lib.rs");
    assert!(map(lib).is_empty());
    assert_eq!(map(&lib.replace("[`qos`] (L1)", "[`qos`] (L2)")).len(), 1);
    assert_eq!(map(&lib.replace("pub mod qos;\n", "")).len(), 1);
    assert_eq!(map(&format!("{lib}pub mod novel;\n")).len(), 1);
}

#[test]
fn unsafe_in_the_wrong_place_or_without_a_reason_is_found() {
    let explained = "fn f() {\n    // SAFETY: it is so.\n    unsafe { g() }\n}\n";
    assert_eq!(breaks(unsafe_code, "src/io/uring.rs", explained), 0);
    assert_eq!(breaks(unsafe_code, "src/manifest/a.rs", explained), 1);
    assert_eq!(breaks(unsafe_code, "tests/a.rs", explained), 0);
    let bare = "fn f() {\n    let a = 1;\n    unsafe { g() }\n}\n";
    assert_eq!(breaks(unsafe_code, "src/io/uring.rs", bare), 1);
    let of_another =
        "fn f() {\n    // SAFETY: it is so.\n    unsafe { g() };\n    unsafe { g() }\n}\n";
    assert_eq!(breaks(unsafe_code, "src/io/uring.rs", of_another), 1);
    let split = "fn f() {\n    // SAFETY: so.\n    let a =\n        unsafe { g() };\n}\n";
    assert_eq!(breaks(unsafe_code, "src/io/uring.rs", split), 0);
    let function = "/// F.\n///\n/// # Safety\n/// Must be so.\npub unsafe fn f() {}\n";
    assert_eq!(breaks(unsafe_code, "src/io/uring.rs", function), 0);
    assert_eq!(breaks(unsafe_code, "src/io/uring.rs", "/// F.\npub unsafe fn f() {}\n"), 1);
    assert_eq!(breaks(unsafe_code, "src/qos/a.rs", "#![forbid(unsafe_code)]\n// unsafe {\n"), 0);
}

#[test]
fn leftovers_are_found() {
    for text in ["todo!()", "dbg!(a);", "unimplemented!();", "#[ignore]\nfn f() {}", "// TODO: a"] {
        assert_eq!(breaks(words_not_here, "src/base/a.rs", text), 1, "{text}");
    }
    assert_eq!(breaks(words_not_here, "src/base/a.rs", "let a = \"todo!()\"; // dbg!"), 0);
    assert_eq!(breaks(words_not_here, "tests/a.rs", "queue::sleep(&queues, a)"), 0);
    let sleep = "std::thread::sleep(a);";
    assert_eq!(breaks(words_not_here, "src/base/a.rs", sleep), 0, "not a test");
    assert_eq!(breaks(words_not_here, "tests/a.rs", sleep), 1);
    assert_eq!(breaks(words_not_here, "src/base/a_test.rs", sleep), 1);
    let asking = format!("while !a() {{\n    assert!(now() < deadline);\n    {sleep}\n}}\n");
    assert_eq!(breaks(words_not_here, "tests/a.rs", &asking), 0);
    assert_eq!(breaks(words_not_here, "tests/a.rs", &asking.replace("deadline", "b")), 1);
    let module = format!("fn f() {{}}\n#[cfg(test)]\nmod tests {{\n    {sleep}\n}}\n");
    assert_eq!(breaks(words_not_here, "src/base/a.rs", &module), 1);
}

#[test]
fn heads_and_denied_lints_are_missed() {
    assert_eq!(breaks(head, "src/base/a.rs", "//! What for.\n"), 0);
    assert_eq!(breaks(head, "src/base/a.rs", "use a;\n"), 1);
    assert_eq!(breaks(head, "src/base/a.rs", "//!\n"), 1);
    let all = "#![deny(clippy::unwrap_used, clippy::indexing_slicing)]\n\
               #![deny(clippy::arithmetic_side_effects)]\n";
    assert_eq!(breaks(checked, "src/virtio/mod.rs", all), 0);
    assert_eq!(breaks(checked, "src/virtio/mod.rs", &all.replace("#![deny", "// #![deny")), 3);
    assert_eq!(breaks(checked, "src/manifest/mod.rs", &all.replace("indexing", "other")), 1);
}
