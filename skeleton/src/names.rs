//! Names of the merged module's functions, for backtraces.

use std::collections::HashMap;

use anyhow::Result;
use wasm_encoder::{NameMap, NameSection};
use wasmparser::{ExternalKind, Name};

use crate::core_module::CoreModule;
use crate::link::Link;

/// The name section: each function under the name it had.
pub(crate) fn merged(link: &Link<'_, '_>) -> Result<NameSection> {
    let mut names = NameMap::new();
    let mut merged = 0;
    for function in &link.imports {
        names.append(merged, function.name);
        merged += 1;
    }
    let of_modules = link.graph.order.iter().map(|module| (*module, of_module(&link.graph.modules[*module])));
    let of_modules = of_modules.collect::<HashMap<_, _>>();
    for (module, index) in &link.functions {
        if let Some(name) = of_modules.get(module).and_then(|names| names.get(index)) {
            names.append(merged, name);
        }
        merged += 1;
    }
    let mut section = NameSection::new();
    section.module("merged");
    section.functions(&names);
    Ok(section)
}

/// Names of a module's functions: those in its name section, else those under
/// which it exports them. A damaged name section is as good as none.
fn of_module<'a>(module: &CoreModule<'a>) -> HashMap<u32, &'a str> {
    let mut names = HashMap::new();
    for export in module.exports.values().filter(|export| export.kind == ExternalKind::Func) {
        names.insert(export.index, export.name);
    }
    for subsection in module.names.clone().into_iter().flatten().map_while(Result::ok) {
        if let Name::Function(map) = subsection {
            names.extend(map.into_iter().map_while(Result::ok).map(|naming| (naming.index, naming.name)));
        }
    }
    names
}
