//! The `inspect` command: what is in an artifact.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use serde::Serialize;
use wasmtime::component::types::ComponentItem;

use crate::artifact::{Artifact, Manifest, sections};
use crate::cache::Cache;
use crate::cli::InspectArgs;
use crate::code::{Layout, Loader};
use crate::engine;
use crate::guest_log::Printable;
use crate::units::approximate;

/// The interface whose version is that of its world.
const HANDLER: &str = "wsgi-wasm:gateway/handler";
/// The world.
const WORLD: &str = "wsgi-wasm:gateway/application";
/// Bytes of one text of an artifact's that are shown.
const MAX_SHOWN: usize = 4096;

/// All that `inspect --json` prints.
#[derive(Serialize)]
struct Description {
    path: String,
    size: usize,
    component: ComponentDescription,
    layers: Vec<LayerDescription>,
    manifest: Option<Manifest>,
}

#[derive(Serialize)]
struct ComponentDescription {
    size: usize,
    /// Bytes of its memory at the start.
    snapshot_size: usize,
    /// Bytes of memory that a usual request writes to, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    written_size: Option<usize>,
    /// All other bytes.
    code_size: usize,
    sha256: String,
    /// The WIT world that it is made for, if that is ours.
    world: Option<String>,
    /// How the code is shared with other apps on this host.
    code: Layout,
    /// Interfaces that the host must provide.
    imports: Vec<String>,
    /// Interfaces that the app provides.
    exports: Vec<String>,
}

#[derive(Serialize)]
struct LayerDescription {
    name: &'static str,
    guest_path: &'static str,
    packed_size: usize,
}

/// Prints the description.
///
/// # Errors
///
/// A [`crate::error::UserError`] if the file is not a component.
#[expect(clippy::print_stdout, reason = "this is the command's output")]
pub fn run(args: &InspectArgs) -> Result<()> {
    let description = describe(&Artifact::open(&args.app)?)?;
    if args.json {
        println!("{}", escaped(&serde_json::to_string_pretty(&description)?));
    } else {
        print!("{}", text(&description)?);
    }
    Ok(())
}

fn describe(artifact: &Artifact) -> Result<Description> {
    let cache = Cache::open()?;
    let engine = engine::compiler().map_err(anyhow::Error::from)?;
    let digests = artifact.digests(&cache)?;
    let code = Loader::new(&engine, &cache).load(artifact, &digests, None, &|_| {})?;
    let component_type = code.component.component_type();
    let bytes = artifact.component(&digests)?;
    let snapshot_size = data_size(&bytes);
    Ok(Description {
        path: artifact.path.display().to_string(),
        size: artifact.size(),
        component: ComponentDescription {
            size: bytes.len(),
            snapshot_size,
            written_size: wsgi_wasm_skeleton::written_size(&bytes),
            code_size: bytes.len() - snapshot_size,
            world: component_type
                .exports(&engine)
                .find_map(|(name, _)| name.strip_prefix(HANDLER))
                .map(|version| format!("{WORLD}{version}")),
            sha256: digests.component,
            code: code.layout,
            imports: component_type
                .imports(&engine)
                // A skeleton's import of the app's own part is met by the app.
                .filter(|(_, item)| !matches!(item.ty, ComponentItem::Module(_)))
                .map(|(name, _)| name.to_owned())
                .collect(),
            exports: component_type
                .exports(&engine)
                // componentize-py adds one without a package, which is its own.
                .filter(|(name, _)| name.contains(':'))
                .filter(|(_, item)| {
                    matches!(item.ty, ComponentItem::ComponentInstance(_) | ComponentItem::ComponentFunc(_))
                })
                .map(|(name, _)| name.to_owned())
                .collect(),
        },
        layers: artifact
            .layers()
            .map(|(layer, size)| LayerDescription {
                name: layer.name(),
                guest_path: layer.guest_path(),
                packed_size: size,
            })
            .collect(),
        manifest: artifact.manifest().cloned(),
    })
}

/// Bytes in the data sections of a component's core modules. That is the
/// snapshot, but for a few constants.
fn data_size(component: &[u8]) -> usize {
    const CORE_MODULE: u8 = 1;
    const DATA: u8 = 11;
    sections(component)
        .flatten()
        .filter(|section| section.id == CORE_MODULE)
        .flat_map(|module| {
            let module = &component[module.content];
            sections(module).flatten().filter(|section| section.id == DATA).map(|data| data.content.len())
        })
        .sum()
}

/// JSON without control characters of an artifact's, of which a string may
/// hold some as they are.
fn escaped(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_control() && c != '\n' {
            // Infallible: it is a string.
            let _ = write!(text, "\\u{:04x}", u32::from(c));
        } else {
            text.push(c);
        }
    }
    text
}

fn text(description: &Description) -> Result<String> {
    let mut out = String::new();
    // All that an artifact says of itself may be meant for the terminal.
    let shown = |text: &str| Printable(text, MAX_SHOWN).to_string();
    let size = |bytes: usize| approximate(bytes as u64);
    let mut write = || -> std::fmt::Result {
        writeln!(out, "{} ({})", description.path, size(description.size))?;
        if let Some(manifest) = &description.manifest {
            writeln!(out, "application  {}", shown(&manifest.application))?;
            writeln!(out, "python       {}", shown(&manifest.python))?;
            for (tool, version) in &manifest.tools {
                writeln!(out, "built by     {} {}", shown(tool), shown(version))?;
            }
            for path in &manifest.warmup {
                writeln!(out, "warmed up    {}", shown(path))?;
            }
            for (name, value) in &manifest.environment {
                writeln!(out, "environment  {}={}", shown(name), shown(value))?;
            }
            for (prefix, directory) in &manifest.static_files {
                writeln!(out, "static       {} from {}", shown(prefix), shown(directory))?;
            }
            writeln!(out, "\npackages")?;
            for package in &manifest.packages {
                let license = shown(package.license.as_deref().unwrap_or("-"));
                writeln!(out, "  {:<24} {:<12} {license}", shown(&package.name), shown(&package.version))?;
            }
        }
        writeln!(out, "\nparts")?;
        let component = &description.component;
        writeln!(out, "  {:<24} {}", "snapshot", size(component.snapshot_size))?;
        if let Some(written) = component.written_size {
            writeln!(out, "  {:<24} {}", "written by a request", size(written))?;
        }
        writeln!(out, "  {:<24} {}", "code", size(component.code_size))?;
        for layer in &description.layers {
            let name = format!("layer {} at {}", layer.name, layer.guest_path);
            writeln!(out, "  {name:<24} {}", size(layer.packed_size))?;
        }
        writeln!(out, "\ncode         {}", shown(&component.code.to_string()))?;
        if let Some(world) = &component.world {
            writeln!(out, "world        {}", shown(world))?;
        }
        writeln!(out, "\nimports")?;
        for import in &component.imports {
            writeln!(out, "  {}", shown(import))?;
        }
        writeln!(out, "\nexports")?;
        for export in &component.exports {
            writeln!(out, "  {}", shown(export))?;
        }
        Ok(())
    };
    write().context("failed to format the description")?;
    Ok(out)
}
