//! A component becomes a skeleton, which is all its code, and a tenant
//! module, which is its memory and what else differs between apps.
//!
//! The skeleton is the original component but for these changes:
//!
//! - it imports the tenant module, and instantiates it before all others;
//! - the module that defined the memory imports it from there, and the modules
//!   with start values import those (see [`hollow`](crate::hollow));
//! - custom sections at the top level are left out, since they do nothing; one
//!   of them says which pages of the memory are written to (see [`written`]).
//!
//! So the only index spaces that shift are those of core instances, by one.

use std::collections::HashMap;

use anyhow::{Context as _, Result, bail, ensure};
use wasm_encoder::{
    ComponentAliasSection, ComponentImportSection, ComponentSection as _, ComponentTypeRef, CoreTypeSection,
    ExportKind, InstanceSection, ModuleArg, RawSection,
};
use wasmparser::{
    ComponentAlias, ComponentAliasSectionReader, ComponentExternalKind, ComponentImportSectionReader,
    ComponentOuterAliasKind, ExternalKind, FromReader as _, Instance, InstanceSectionReader,
};

use crate::TENANT;
use crate::core_module::CoreModule;
use crate::hollow::Hollowed;
use crate::sections::{PREAMBLE, Section, id, sections};
use crate::written;

/// A component taken apart.
#[derive(Debug)]
pub struct Split {
    /// A component that imports the core module [`TENANT`]. The same for all
    /// apps with the same code.
    pub skeleton: Vec<u8>,
    /// The core module with the app's memory and start values. It has no code but
    /// what writes to pages that the component lists.
    pub tenant: Vec<u8>,
    /// The first page of the memory that has data; pages have 4096 bytes.
    pub first_page: u32,
}

/// Takes `component` apart.
///
/// Neither part is validated: compiling them does that.
///
/// # Errors
///
/// Why the component can not be split.
pub fn split(component: &[u8]) -> Result<Split> {
    let sections = sections(component)?;
    let modules = sections
        .iter()
        .filter(|section| section.id == id::CORE_MODULE)
        .map(|section| CoreModule::read(section.content))
        .collect::<Result<Vec<_>>>()?;
    ensure!(
        modules.iter().any(|module| module.is_shared_library),
        "it is not linked from shared libraries, so no other app has the same code"
    );
    check_shape(&sections)?;
    let hollowed = Hollowed::of(&modules, &written::read(&sections)?)?;
    let instantiations = instantiations(&sections)?;
    for (index, module) in hollowed.modules.iter().enumerate() {
        let once = u32::try_from(index).is_ok_and(|index| instantiations.get(&index) == Some(&1));
        ensure!(
            module.is_none() || once,
            "module {index}, which holds state, is not instantiated exactly once"
        );
    }
    let mut skeleton = PREAMBLE.to_vec();
    let (mut module_index, mut has_tenant) = (0, false);
    for section in &sections {
        match section.id {
            id::CUSTOM => {}
            id::CORE_MODULE => {
                match &hollowed.modules[module_index] {
                    Some(rewritten) => {
                        RawSection { id: id::CORE_MODULE, data: rewritten }
                            .append_to_component(&mut skeleton);
                    }
                    None => skeleton.extend_from_slice(section.whole),
                }
                module_index += 1;
            }
            id::CORE_INSTANCE => {
                if !has_tenant {
                    append_tenant(&hollowed, &mut skeleton);
                    has_tenant = true;
                }
                append_instances(section, &hollowed, &mut skeleton)?;
            }
            id::ALIAS => append_aliases(section, &mut skeleton)?,
            _ => skeleton.extend_from_slice(section.whole),
        }
    }
    Ok(Split { skeleton, tenant: hollowed.tenant, first_page: hollowed.first_page })
}

/// Refuses what would make other index spaces shift, or what is not followed
/// here.
fn check_shape(sections: &[Section<'_>]) -> Result<()> {
    let mut has_instances = false;
    for section in sections {
        match section.id {
            id::CORE_INSTANCE => has_instances = true,
            id::CORE_MODULE => ensure!(!has_instances, "a core module comes after the first core instance"),
            id::CORE_TYPE => bail!("it has core types of its own"),
            id::IMPORT => {
                for import in ComponentImportSectionReader::new(section.reader())? {
                    let is_module = matches!(import?.ty, wasmparser::ComponentTypeRef::Module(_));
                    ensure!(!is_module, "it imports a core module");
                }
            }
            id::ALIAS => {
                for alias in ComponentAliasSectionReader::new(section.reader())? {
                    let is_module = matches!(
                        alias?,
                        ComponentAlias::InstanceExport { kind: ComponentExternalKind::Module, .. }
                            | ComponentAlias::Outer {
                                kind: ComponentOuterAliasKind::CoreModule | ComponentOuterAliasKind::CoreType,
                                ..
                            }
                    );
                    ensure!(!is_module, "it has an alias of a core module");
                }
            }
            _ => {}
        }
    }
    ensure!(has_instances, "it has no core instances");
    Ok(())
}

/// How often each module is instantiated.
fn instantiations(sections: &[Section<'_>]) -> Result<HashMap<u32, usize>> {
    let mut counts = HashMap::new();
    for section in sections.iter().filter(|section| section.id == id::CORE_INSTANCE) {
        for instance in InstanceSectionReader::new(section.reader())? {
            if let Instance::Instantiate { module_index, .. } = instance? {
                *counts.entry(module_index).or_default() += 1;
            }
        }
    }
    Ok(counts)
}

/// The type of the tenant module, its import, and its instance.
fn append_tenant(hollowed: &Hollowed, skeleton: &mut Vec<u8>) {
    let mut types = CoreTypeSection::new();
    types.ty().module(&hollowed.tenant_type);
    types.append_to_component(skeleton);
    let mut imports = ComponentImportSection::new();
    imports.import(TENANT, ComponentTypeRef::Module(0));
    imports.append_to_component(skeleton);
    let mut instances = InstanceSection::new();
    instances.instantiate::<_, &str>(hollowed.tenant_index(), []);
    instances.append_to_component(skeleton);
}

/// The core instances of `section`, behind the tenant's. Those with state get
/// the tenant as one more argument.
fn append_instances(section: &Section<'_>, hollowed: &Hollowed, skeleton: &mut Vec<u8>) -> Result<()> {
    let mut instances = InstanceSection::new();
    for instance in InstanceSectionReader::new(section.reader())? {
        match instance? {
            Instance::Instantiate { module_index, args } => {
                let mut arguments = args
                    .iter()
                    .map(|argument| Ok((argument.name, ModuleArg::Instance(shifted(argument.index)?))))
                    .collect::<Result<Vec<_>>>()?;
                let module =
                    hollowed.modules.get(module_index as usize).context("an instance of no module")?;
                if module.is_some() {
                    arguments.push((TENANT, ModuleArg::Instance(0)));
                }
                instances.instantiate(module_index, arguments);
            }
            Instance::FromExports(exports) => {
                let items = exports
                    .iter()
                    .map(|export| Ok((export.name, export_kind(export.kind)?, export.index)))
                    .collect::<Result<Vec<_>>>()?;
                instances.export_items(items);
            }
        }
    }
    instances.append_to_component(skeleton);
    Ok(())
}

/// The aliases of `section`, those of exports of core instances shifted.
fn append_aliases(section: &Section<'_>, skeleton: &mut Vec<u8>) -> Result<()> {
    let mut reader = section.reader();
    let count = reader.read_var_u32()?;
    for _ in 0..count {
        let start = reader.original_position();
        let alias = ComponentAlias::from_reader(&mut reader)?;
        if let ComponentAlias::CoreInstanceExport { kind, instance_index, name } = alias {
            let mut aliases = ComponentAliasSection::new();
            let instance = shifted(instance_index)?;
            aliases.alias(wasm_encoder::Alias::CoreInstanceExport {
                instance,
                kind: export_kind(kind)?,
                name,
            });
            aliases.append_to_component(skeleton);
        } else {
            let item =
                section.content.get(start..reader.original_position()).context("an alias without end")?;
            append_single(id::ALIAS, item, skeleton);
        }
    }
    Ok(())
}

/// A section with `item` as its only item.
pub(crate) fn append_single(id: u8, item: &[u8], component: &mut Vec<u8>) {
    let data = [&[1], item].concat();
    RawSection { id, data: &data }.append_to_component(component);
}

/// The index of a core instance of the original in the skeleton.
fn shifted(instance: u32) -> Result<u32> {
    instance.checked_add(1).context("an index out of range")
}

/// The encoder's name for `kind`.
pub(crate) fn export_kind(kind: ExternalKind) -> Result<ExportKind> {
    Ok(match kind {
        ExternalKind::Func => ExportKind::Func,
        ExternalKind::Table => ExportKind::Table,
        ExternalKind::Memory => ExportKind::Memory,
        ExternalKind::Global => ExportKind::Global,
        ExternalKind::Tag | ExternalKind::FuncExact => bail!("an export of a kind that is not known here"),
    })
}
