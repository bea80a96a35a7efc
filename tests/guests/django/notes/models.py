from django.db import models
from django.urls import reverse


class Tag(models.Model):
    name = models.SlugField(unique=True)

    def __str__(self):
        return self.name


class Note(models.Model):
    title = models.CharField(max_length=100)
    text = models.TextField(blank=True)
    tags = models.ManyToManyField(Tag, blank=True)
    attributes = models.JSONField(default=dict, blank=True)
    attachment = models.FileField(upload_to="attachments", blank=True)
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["id"]

    def __str__(self):
        return self.title

    def get_absolute_url(self):
        return reverse("note", args=[self.pk])


class Counter(models.Model):
    """One row that everybody changes."""

    value = models.IntegerField(default=0)
