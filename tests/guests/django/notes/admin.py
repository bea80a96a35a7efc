from django.contrib import admin

from .models import Note, Tag

admin.site.register(Tag)


@admin.register(Note)
class NoteAdmin(admin.ModelAdmin):
    list_display = ["title", "created"]
    list_filter = ["tags"]
    search_fields = ["title", "text"]
