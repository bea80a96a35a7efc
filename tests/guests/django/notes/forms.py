from django import forms

from .models import Note


class NoteForm(forms.ModelForm):
    tag_names = forms.CharField(required=False)

    class Meta:
        model = Note
        fields = ["title", "text", "attachment"]

    def clean_title(self):
        title = self.cleaned_data["title"]
        if title.islower():
            raise forms.ValidationError("A title starts with a capital letter.")
        return title
